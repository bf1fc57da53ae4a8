// SPDX-License-Identifier: Apache-2.0

// Package netns creates and enters named network namespaces: a sandbox's own,
// if the engine provides none, and those that scenarios create as a network
// plugin does.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/internal/thread"
)

// Dir is the directory of named namespaces, also for `ip netns`.
const Dir = "/run/netns"

// Namespace is a network namespace that is bind-mounted at a path.
type Namespace struct {
	Path    string
	created bool
}

// Path returns the path of a namespace that a sandbox creates for itself.
func Path(sandbox string) string { return filepath.Join(Dir, "kata-"+sandbox) }

// New returns the engine's namespace, or creates one if path is empty.
func New(path, sandbox string) (*Namespace, error) {
	if path != "" {
		return &Namespace{Path: path}, nil
	}
	return Make(Path(sandbox))
}

// Make creates a namespace that is bind-mounted at path until Remove is called.
func Make(path string) (*Namespace, error) {
	f, err := create(path)
	if err != nil {
		return nil, fmt.Errorf("create a network namespace: %w", err)
	}
	f.Close()
	err = thread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("create a network namespace: %w", err)
	}
	return &Namespace{Path: path, created: true}, nil
}

// create creates the file that the namespace is mounted on. A leftover file is
// reused: its namespace disappeared with its shim. The directory may disappear
// meanwhile: the end of a testbed removes it if it is empty.
func create(path string) (f *os.File, err error) {
	for range 10 {
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if f, err = os.OpenFile(path, os.O_CREATE, 0o444); !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	return f, err
}

// Do runs f in the namespace, and processes that f starts. They must not have a
// parent death signal, because f's thread exits.
func (n *Namespace) Do(f func() error) error {
	ns, err := os.Open(n.Path)
	if err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	defer ns.Close()
	return thread.Do(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace %s: %w", n.Path, err)
		}
		return f()
	})
}

// Remove removes what New or Make created.
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
