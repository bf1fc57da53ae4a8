// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// maxToken bounds what is read from a marker file, in bytes.
const maxToken = 256

// withdraw moves the exchange mount from the mount namespace of a container
// that has not started to target in the guest's root namespace, and removes its
// mount point. The token proves that it is the right mount.
func withdraw(init process, destination, token, target string) error {
	if !path.IsAbs(destination) || path.Clean(destination) != destination || destination == "/" {
		return errcode.BadAgentRequest.Errorf("exchange mount: destination %q is not a clean absolute path", destination)
	}
	parts, err := inspect.PartialMounts(init.PID)
	if err != nil {
		return fmt.Errorf("withdraw the exchange mount: %w", err)
	}
	mount := -1
	process, err := pidfd.Open(init.PID)
	if err != nil {
		return fmt.Errorf("withdraw the exchange mount: open the container's process: %w", err)
	}
	defer unix.Close(process)
	if !init.alive() {
		return errcode.ProcessExited.Wrap(errors.New("withdraw the exchange mount: the container's process has exited"))
	}
	err = thread.Do(func() (err error) {
		if err := unix.Setns(process, unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the container's mount namespace: %w", err)
		}
		if mount, err = takeMount(destination, token); err != nil {
			return err
		}
		if err := unix.Unmount(destination, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", destination, err)
		}
		for _, p := range parts {
			if p == destination {
				continue
			}
			if err := unix.Mount("", p, "", unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("make %s private: %w", p, err)
			}
		}
		return removeMountPoint(destination)
	})
	if mount >= 0 {
		defer unix.Close(mount)
	}
	if err != nil {
		return fmt.Errorf("withdraw the exchange mount: %w", err)
	}
	if err := os.MkdirAll(target, 0o700); err != nil {
		return err
	}
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("keep the exchange mount: %w", err)
	}
	return nil
}

// takeMount clones the mount at destination in the calling thread's mount
// namespace, if its marker file has the token.
func takeMount(destination, token string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, destination, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, fmt.Errorf("clone the mount at %s: %w", destination, err)
	}
	if err := checkMarker(fd, token); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("the mount at %s is not the exchange mount: %w", destination, err)
	}
	// It leaves the container's peer group: mounts below it must not propagate.
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("make the exchange mount private: %w", err)
	}
	return fd, nil
}

func checkMarker(dir int, token string) error {
	fd, err := unix.Openat2(dir, api.MarkerName, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return fmt.Errorf("open marker: %w", err)
	}
	f := os.NewFile(uintptr(fd), api.MarkerName)
	defer f.Close()
	got, err := io.ReadAll(io.LimitReader(f, maxToken))
	if err != nil {
		return fmt.Errorf("read marker: %w", err)
	}
	if token == "" || string(got) != token {
		return errors.New("marker token mismatch")
	}
	return nil
}

// removeMountPoint removes the directory that Kata created for the mount,
// through a writable clone of the container's root if that is read-only.
func removeMountPoint(destination string) error {
	err := unix.Rmdir(destination)
	if errors.Is(err, unix.EROFS) {
		err = removeReadOnly(destination)
	}
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
		return nil // the image's own directory, with files
	}
	return fmt.Errorf("remove %s: %w", destination, err)
}

func removeReadOnly(destination string) error {
	root, err := unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(root, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return err
	}
	return unix.Unlinkat(root, destination[1:], unix.AT_REMOVEDIR)
}

// exchangePath is where the agent keeps a container's exchange mount.
func (a *Agent) exchangePath(id string) string { return filepath.Join(a.dir, "exchange", id) }

// release unmounts a container's exchange mount.
func (a *Agent) release(id string) error {
	target := a.exchangePath(id)
	for {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // no longer a mount point
		}
		if err != nil {
			return fmt.Errorf("release the exchange mount: %w", err)
		}
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("release the exchange mount: %w", err)
	}
	return nil
}

// inExchange returns the path of a directory in a container's exchange mount.
// The name comes from the shim and must be a single path element.
func (a *Agent) inExchange(id, name string) (string, error) {
	if name == "" || name[0] == '.' || path.Base(name) != name {
		return "", errcode.BadAgentRequest.Errorf("invalid directory name %q", name)
	}
	target := a.exchangePath(id)
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, 0, &st); err != nil || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return "", errcode.ExchangeLost.Wrap(errors.New("the container's exchange mount is gone"))
	}
	return filepath.Join(target, name), nil
}
