// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// start prints the address of the sandbox's shim, and starts that shim unless
// the container joins a running one. Nothing else may be printed: containerd
// takes the whole output for the address.
func start(w way.Way, f *flags) error {
	_, kind, sandbox, err := sandboxOf(f.id)
	if err != nil {
		return err
	}
	address := w.Address(f.address, f.namespace, sandbox)
	if kind.OwnsSandbox() {
		if err := startDaemon(w, f, strings.TrimPrefix(address, "unix://")); err != nil {
			return fmt.Errorf("start the shim: %w", err)
		}
	}
	if err := replace("address", address); err != nil {
		return err
	}
	fmt.Print(address)
	return nil
}

func startDaemon(w way.Way, f *flags, path string) error {
	socket, err := listen(w, path)
	if err != nil {
		return err
	}
	defer socket.Close()
	args := []string{"-namespace", f.namespace, "-address", f.address, "-publish-binary", f.publish, "-id", f.id}
	if f.debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(executable(), args...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", way.Env+"="+string(w), socketEnv+"="+path)
	cmd.ExtraFiles = []*os.File{socket} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// The child inherits the thread's mount namespace; nothing else may run on
	// the thread.
	runtime.LockOSThread()
	if err := ownMounts(); err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := replace("shim.pid", strconv.Itoa(cmd.Process.Pid)); err != nil {
		return errors.Join(err, cmd.Process.Kill())
	}
	return cmd.Process.Release()
}

// listen listens on the shim's socket. The Go shim replaces an existing one.
func listen(w way.Way, path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) && w == way.Go {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	}
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return l.File()
}

// ownMounts gives the calling thread a mount namespace that is a slave of the
// host's.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("private mount namespace: %w", err)
	}
	for _, propagation := range []uintptr{unix.MS_SLAVE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|propagation, ""); err != nil {
			return fmt.Errorf("private mount namespace: %w", err)
		}
	}
	return nil
}

// replace writes a file atomically.
func replace(name, content string) error {
	temporary := "." + name
	if err := os.WriteFile(temporary, []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, name)
}
