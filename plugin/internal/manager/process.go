// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// endTimeout bounds the wait for a process that was killed.
const endTimeout = 2 * time.Second

// withProcess calls f with a pidfd of a process, if there is one and isMeant
// confirms that it is the intended one.
func withProcess(pid int, isMeant func() bool, f func(fd int) error) error {
	if pid <= 1 {
		return nil
	}
	fd, err := pidfd.Open(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// What is true of the pid now is true of the descriptor's process.
	if !isMeant() {
		return nil
	}
	return f(fd)
}

// end waits for the intended process to exit, and kills it after a grace
// period.
func end(pid int, grace time.Duration, isMeant func() bool) error {
	return withProcess(pid, isMeant, func(fd int) error {
		if ended, err := pidfd.Wait(fd, grace); ended || err != nil {
			return err
		}
		if err := pidfd.Kill(fd); err != nil {
			return err
		}
		ended, err := pidfd.Wait(fd, endTimeout)
		if err == nil && !ended {
			err = fmt.Errorf("process %d does not exit", pid)
		}
		return err
	})
}

// EndKata kills the daemon of Kata's shim that was started in a sandbox's
// bundle, and its VM, and removes what they leave behind.
func EndKata(dir, sandbox string) error {
	return errclass.Join(killKata(dir, 0), endVM(dir, sandbox, time.Now().Add(endTimeout)), kata.Sweep(sandbox))
}

// endVM kills the VM of a sandbox whose Kata is gone, and waits until it has
// been reaped: Kata's delete mistakes a zombie VMM for a running one, and waits
// for its agent until containerd kills it
// (src/runtime/virtcontainers/hypervisor.go, IsHypervisorRunning).
func endVM(dir, sandbox string, until time.Time) error {
	pid, start, err := bundle.VM(dir)
	if err != nil || pid == 0 {
		return err
	}
	if !procfs.Is(pid, start) {
		return nil
	}
	if procfs.Runs(pid, start) {
		// Every VMM of Kata's has the sandbox's id in its arguments: in the path of
		// its API socket, or as its name.
		if err := end(pid, 0, func() bool { return procfs.Is(pid, start) && hasArgument(pid, sandbox) }); err != nil {
			return fmt.Errorf("end the VM: %w", err)
		}
	}
	for procfs.Is(pid, start) && !procfs.Runs(pid, start) {
		if time.Now().After(until) {
			return fmt.Errorf("the VM's process %d has exited and is not reaped", pid)
		}
		time.Sleep(5 * time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	return nil
}

// hasArgument reports whether a text is in the arguments of a process.
func hasArgument(pid int, text string) bool {
	args, err := procfs.Cmdline(pid)
	return err == nil && slices.ContainsFunc(args, func(arg string) bool { return strings.Contains(arg, text) })
}

// killKata kills the daemon of Kata's shim that was started in a bundle, unless
// it exits within a grace period.
func killKata(dir string, grace time.Duration) error {
	pid, err := kataPID(dir)
	if err == nil {
		err = end(pid, grace, func() bool { return procfs.WorksIn(pid, dir) })
	}
	if err != nil {
		return fmt.Errorf("end Kata's shim: %w", err)
	}
	return nil
}

// kataPID returns the pid of the daemon of Kata's shim that was started in a
// bundle, 0 if unknown. Both of Kata's shims write it to shim.pid there, and
// keep the bundle as their working directory.
func kataPID(dir string) (int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "shim.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0, fmt.Errorf("shim.pid: %w", err)
	}
	return pid, nil
}

// ProtectShare keeps the daemon of Kata's shim that was started in a sandbox's
// bundle from deleting the files that it shares with the guest; see
// [kata.Protect].
func ProtectShare(dir, sandbox string) error {
	pid, err := kataPID(dir)
	if err != nil {
		return err
	}
	return withProcess(pid, func() bool { return procfs.WorksIn(pid, dir) }, func(fd int) error { return kata.Protect(fd, pid, sandbox) })
}

// Virtiofsd opens the process that serves the files of a sandbox's VM, a child of
// the daemon of Kata's shim that was started in a bundle; see [pidfd.OpenFile]. It
// returns nil if there is none, as where the VMM serves them itself.
func Virtiofsd(dir, sandbox string) (*os.File, error) {
	kata, err := kataPID(dir)
	if err != nil || kata == 0 || !procfs.WorksIn(kata, dir) {
		return nil, err
	}
	pids, err := procfs.Children(kata)
	if err != nil {
		return nil, err
	}
	// It has the path of the sandbox's share in its arguments.
	is := func(pid int) bool {
		args, err := procfs.Cmdline(pid)
		return err == nil && len(args) > 0 && strings.Contains(filepath.Base(args[0]), "virtiofsd") && hasArgument(pid, sandbox)
	}
	for _, pid := range pids {
		if !is(pid) {
			continue
		}
		f, err := pidfd.OpenFile(pid)
		if errors.Is(err, os.ErrProcessDone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if is(pid) {
			return f, nil
		}
		f.Close()
	}
	return nil, nil //nolint:nilnil // there may be none
}

// SetWritable sets whether the guest of the sandbox whose Kata shim was started
// in a bundle can write to a directory of the host; see [kata.SetWritable].
func SetWritable(bundle, sandbox, dir string, writable bool) error {
	pid, err := kataPID(bundle)
	if err != nil {
		return err
	}
	return withProcess(pid, func() bool { return procfs.WorksIn(pid, bundle) }, func(fd int) error {
		return kata.SetWritable(fd, pid, sandbox, dir, writable)
	})
}
