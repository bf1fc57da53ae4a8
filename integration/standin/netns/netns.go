// Package netns holds the network namespace that a sandbox's VMM and the
// engine's hooks run in. The guest gets no interface out of it: what counts is
// that hooks find a namespace other than the host's at the VMM's pid.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace with a name in the file system.
type Namespace struct {
	Path    string
	created bool
}

// Path is where a namespace that New makes has its name.
func Path(sandbox string) string { return filepath.Join("/run/netns", "kata-"+sandbox) }

// New opens the engine's namespace, or makes one where the engine names none.
func New(path, sandbox string) (*Namespace, error) {
	if path != "" {
		return &Namespace{Path: path}, nil
	}
	path = Path(sandbox)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	// The name of one that was never removed is taken over: its namespace went
	// with the shim that had it.
	f, err := os.OpenFile(path, os.O_CREATE, 0o444)
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return &Namespace{Path: path, created: true}, nil
}

// Do runs f in the namespace. A process that f starts is in it, too, and dies
// of no thread's end: f must not ask for a parent death signal.
func (n *Namespace) Do(f func() error) error {
	ns, err := os.Open(n.Path)
	if err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	defer ns.Close()
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace %s: %w", n.Path, err)
		}
		return f()
	})
}

// Remove takes away what New made.
func (n *Namespace) Remove() error {
	if !n.created {
		return nil
	}
	err := unix.Unmount(n.Path, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if rm := os.Remove(n.Path); !errors.Is(rm, os.ErrNotExist) {
		err = errors.Join(err, rm)
	}
	if err != nil {
		return fmt.Errorf("remove the network namespace: %w", err)
	}
	return nil
}

// onThread runs f on a thread that ends with it, so that no other goroutine
// ever runs in what f has joined.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}
