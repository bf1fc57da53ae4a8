// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// What all testbeds of a machine share. The first one sets it up, the last one
// restores it:
//
//   - Mounts below / are shared, as under systemd, so that Kata's reach its virtiofsd.
//   - Something listens on /dev/log: Kata's Go shim does not start without it.
//
// The directory has a file for each testbed, named by the digest of the
// testbed's directory, which is its content.
const (
	machineDir  = "/run/kata-checkpoint-testbed"
	machineLock = "/run/kata-checkpoint-testbed.lock"
)

// machineState records what was done to the machine. It is stored in
// machineDir.
type machineState struct {
	// KeepShared has the mounts that were shared or slaves before, or is nil if
	// the propagation was not changed.
	KeepShared []string `json:"keep_shared,omitempty"`
	MadeShared bool     `json:"made_shared"`
	Syslogd    process  `json:"syslogd"`
}

// withMachine runs do under a lock that all testbeds share.
func withMachine(do func() error) error {
	for {
		f, err := os.OpenFile(machineLock, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		// The last testbed removes the locked file while others may wait for
		// it. A lock on a removed file excludes nobody.
		held, err := f.Stat()
		if err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		if named, err := os.Stat(machineLock); err == nil && os.SameFile(held, named) {
			return do()
		}
	}
}

func userFile(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(machineDir, hex.EncodeToString(sum[:8])+".user")
}

// joinMachine sets the machine up for the testbed in dir.
func joinMachine(dir string) error {
	return withMachine(func() error {
		if err := os.MkdirAll(machineDir, 0o755); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		if err := os.WriteFile(userFile(dir), []byte(dir), 0o644); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		s, err := loadMachine()
		if err != nil {
			return err
		}
		return errors.Join(s.shareMounts(), s.startSyslogd(), s.save())
	})
}

// leaveMachine restores the machine if no testbed is left.
func leaveMachine(dir string) error {
	return withMachine(func() error {
		if err := os.Remove(userFile(dir)); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // never joined
			}
			return fmt.Errorf("machine: %w", err)
		}
		users, _ := filepath.Glob(filepath.Join(machineDir, "*.user"))
		for _, u := range users {
			data, err := os.ReadFile(u)
			if err != nil {
				continue
			}
			if _, err := os.Stat(string(data)); err == nil {
				return nil
			}
			// That testbed was removed by hand.
		}
		s, err := loadMachine()
		if err != nil {
			return err
		}
		if err := errors.Join(s.unshareMounts(), s.stopSyslogd()); err != nil {
			return err
		}
		removeEmpty()
		if err := os.RemoveAll(machineDir); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
		return os.Remove(machineLock)
	})
}

// removeEmpty removes empty directories that Kata creates once for all
// sandboxes and never removes.
func removeEmpty() {
	dirs := []string{
		"/run/kata-containers/shared/sandboxes", "/run/kata-containers/shared", "/run/kata-containers",
		"/run/vc/sbs", "/run/vc/vm", "/run/vc", "/run/kata", "/run/containerd/s", "/run/containerd/fifo", "/run/containerd", "/run/netns",
	}
	for _, name := range []string{"kata_overhead", Namespace} {
		hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*/" + name) // version 1
		dirs = append(append(dirs, hierarchies...), "/sys/fs/cgroup/"+name)
	}
	for _, dir := range dirs {
		_ = unix.Rmdir(dir) // not empty, or not there
	}
}

func machineFile() string { return filepath.Join(machineDir, "state.json") }

func loadMachine() (*machineState, error) {
	s := &machineState{}
	data, err := os.ReadFile(machineFile())
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(data, s)
	}
	if err != nil {
		return nil, fmt.Errorf("machine: %w", err)
	}
	return s, nil
}

func (s *machineState) save() error {
	data, err := json.Marshal(s)
	if err == nil {
		err = os.WriteFile(machineFile(), data, 0o644)
	}
	if err != nil {
		return fmt.Errorf("machine: %w", err)
	}
	return nil
}

func (s *machineState) shareMounts() error {
	all, err := mounts()
	if err != nil {
		return err
	}
	root := slices.IndexFunc(all, func(m mount) bool { return m.path == "/" })
	if root >= 0 && all[root].shared {
		return nil
	}
	s.KeepShared = nil
	for _, m := range all {
		if m.shared || m.slave {
			s.KeepShared = append(s.KeepShared, m.path)
		}
	}
	s.MadeShared = true
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	return nil
}

func (s *machineState) unshareMounts() error {
	if !s.MadeShared {
		return nil
	}
	all, err := mounts()
	if err != nil {
		return err
	}
	for _, m := range all {
		if !m.shared || slices.Contains(s.KeepShared, m.path) {
			continue
		}
		// Unmounted meanwhile, or hidden below another mount.
		if err := unix.Mount("", m.path, "", unix.MS_PRIVATE, ""); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("make %s private again: %w", m.path, err)
		}
	}
	return nil
}

const syslogSocket = "/dev/log"

func (s *machineState) startSyslogd() error {
	if syslogdListens() {
		return nil
	}
	// The socket of one that was killed stays, and nobody else would remove it.
	if err := removeSocket(syslogSocket); err != nil {
		return fmt.Errorf("start syslogd: %w", err)
	}
	cmd := exec.Command("busybox", "syslogd", "-n", "-O", filepath.Join(machineDir, "syslog"))
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start syslogd: %w", err)
	}
	go cmd.Wait() //nolint:errcheck // reaped if this process lives on
	var err error
	if s.Syslogd, err = processOf(cmd.Process.Pid); err != nil {
		return fmt.Errorf("start syslogd: %w", err)
	}
	listens := false
	eventually(context.Background(), hang, func() bool {
		listens = syslogdListens()
		return listens || !s.Syslogd.alive()
	})
	if !listens {
		return errors.New("busybox syslogd does not listen")
	}
	return nil
}

// syslogdListens reports whether anybody receives what is sent to the socket.
func syslogdListens() bool {
	conn, err := net.Dial("unixgram", syslogSocket)
	if err != nil {
		return errors.Is(err, unix.EPROTOTYPE) // a stream, as of some
	}
	conn.Close()
	return true
}

func (s *machineState) stopSyslogd() error {
	if !s.Syslogd.alive() {
		return nil
	}
	s.Syslogd.signal(syscall.SIGTERM) // it removes its pid file
	if !waitGone(context.Background(), hang, s.Syslogd) {
		return errors.New("syslogd did not exit")
	}
	return removeSocket(syslogSocket)
}
