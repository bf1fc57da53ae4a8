// Package netns makes and enters network namespaces that have a name in the
// file system: a sandbox's own, where the engine brings none, and those that
// the scenarios make as a network plugin does.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/internal/thread"
)

// Dir is where namespaces have their names, for `ip netns`, too.
const Dir = "/run/netns"

// Namespace is a network namespace with a name in the file system.
type Namespace struct {
	Path    string
	created bool
}

// Path is where the namespace that a sandbox has made for itself has its name.
func Path(sandbox string) string { return filepath.Join(Dir, "kata-"+sandbox) }

// New opens the engine's namespace, or makes one where the engine names none.
func New(path, sandbox string) (*Namespace, error) {
	if path != "" {
		return &Namespace{Path: path}, nil
	}
	return Make(Path(sandbox))
}

// Make makes a namespace that has a name at path until Remove is called.
func Make(path string) (*Namespace, error) {
	f, err := create(path)
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
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
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return &Namespace{Path: path, created: true}, nil
}

// create makes the file that the namespace is mounted on. The name of one that
// was never removed is taken over: its namespace went with the shim that had
// it. The folder may go while we are about it: a testbed that ends removes it
// when it is empty.
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

// Do runs f in the namespace. A process that f starts is in it, too, and dies
// of no thread's end: f must not ask for a parent death signal.
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

// Remove takes away what New or Make made.
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
