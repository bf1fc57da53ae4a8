// SPDX-License-Identifier: Apache-2.0

// Package share lays out a sandbox's directories on the host as Kata does: the
// directory that virtiofsd exports to the guest, read-only, and the directory
// behind it, in which later mounts are made that propagate to the guest,
// writable where required. It runs in the shim's own mount namespace, whose
// mounts have to be shared. Kata 4.1.0:
// src/runtime/virtcontainers/fs_share_linux.go and
// src/runtime-rs/crates/resource/src/share_fs.
package share

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/config"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Share is a sandbox's share. Its methods are called under the sandbox's lock.
type Share struct {
	way    way.Way
	root   string // of the sandbox
	behind string // where mounts are created
	shown  string // what virtiofsd exports
	guest  string // the share in the guest

	mounts map[string][]string // of a container, in the order of their creation
	// volumes are the Rust way's volumes, by source.
	volumes map[string]*volume
}

type volume struct {
	name     string
	readOnly bool
	users    map[string]bool
}

// New creates the directories.
func New(w way.Way, sandbox string) (*Share, error) {
	s := &Share{
		way:     w,
		root:    way.ShareDir(sandbox),
		guest:   api.GuestShare,
		mounts:  map[string][]string{},
		volumes: map[string]*volume{},
	}
	behind, shown := "mounts", "shared"
	if w == way.Rust {
		behind, shown = "rw", "ro"
	}
	s.behind, s.shown = filepath.Join(s.root, behind), filepath.Join(s.root, shown)
	for _, dir := range []string{s.behind, s.shown} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return nil, fmt.Errorf("create the share: %w", err)
		}
	}
	if err := bind(s.behind, s.shown, unix.MS_SLAVE); err != nil {
		return nil, fmt.Errorf("create the share: %w", err)
	}
	if err := setReadOnly(s.shown, true); err != nil {
		return nil, fmt.Errorf("create the share: %w", err)
	}
	if w == way.Rust {
		s.behind, s.shown = filepath.Join(s.behind, passthrough), filepath.Join(s.shown, passthrough)
		s.guest = filepath.Join(s.guest, passthrough)
		if err := os.MkdirAll(s.behind, 0o750); err != nil {
			return nil, fmt.Errorf("create the share: %w", err)
		}
	}
	return s, nil
}

// Dir is the directory that virtiofsd exports.
func (s *Share) Dir() string {
	if s.way == way.Rust {
		return filepath.Dir(s.shown)
	}
	return s.shown
}

// BindSandbox shares the operator's directories, before the VM starts.
func (s *Share) BindSandbox(mounts []config.BindMount) error {
	for _, m := range mounts {
		name := filepath.Join(sandboxMounts, filepath.Base(m.Source))
		if err := s.add(m.Source, name, !m.Writable); err != nil {
			return fmt.Errorf("share sandbox bind mount: %w", err)
		}
	}
	return nil
}

// Rootfs shares a container's root and returns its path in the guest. A
// read-only root is left to the guest.
func (s *Share) Rootfs(cid, source string) (string, error) {
	name := filepath.Join(cid, "rootfs")
	if err := s.add(source, name, false); err != nil {
		return "", fmt.Errorf("share the root of %s: %w", cid, err)
	}
	s.mounts[cid] = append(s.mounts[cid], name)
	return filepath.Join(s.guest, name), nil
}

// Volumes shares the bind mounts of a container and returns its mounts for the
// guest.
func (s *Share) Volumes(cid string, mounts []specs.Mount) ([]specs.Mount, error) {
	rewritten := make([]specs.Mount, 0, len(mounts))
	for _, m := range mounts {
		if slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			m.Type = "bind" // nerdctl's type is none; Kata looks at the options, as runc does
		}
		switch {
		case m.Destination == "/dev/shm":
			m = specs.Mount{Destination: m.Destination, Type: "bind", Source: api.GuestShm, Options: []string{"rbind"}}
		case travels(s.way, m):
			name, err := s.volume(cid, m)
			if err != nil {
				return nil, fmt.Errorf("share the mount on %s: %w", m.Destination, err)
			}
			m.Source = filepath.Join(s.guest, name)
		}
		rewritten = append(rewritten, m)
	}
	return rewritten, nil
}

func (s *Share) volume(cid string, m specs.Mount) (string, error) {
	if s.way == way.Go {
		name := volumeName(s.way, cid, m, randomHex())
		if err := s.add(m.Source, name, readOnly(m)); err != nil {
			return "", err
		}
		s.mounts[cid] = append(s.mounts[cid], name)
		return name, nil
	}
	v := s.volumes[m.Source]
	if v == nil {
		v = &volume{name: volumeName(s.way, cid, m, randomHex()), readOnly: readOnly(m), users: map[string]bool{}}
		if err := s.add(m.Source, v.name, v.readOnly); err != nil {
			return "", err
		}
		s.volumes[m.Source] = v
	}
	if v.readOnly && !readOnly(m) {
		for _, dir := range []string{s.behind, s.shown} {
			if err := setReadOnly(filepath.Join(dir, v.name), false); err != nil {
				return "", err
			}
		}
		v.readOnly = false
	}
	v.users[cid] = true
	return v.name, nil
}

// add mounts source at name behind the share. Making a mount read-only does not
// propagate, so that the Go way bind-mounts what is read-only already, and the
// Rust way changes both mounts.
func (s *Share) add(source, name string, readOnly bool) error {
	target := filepath.Join(s.behind, name)
	if s.way == way.Rust {
		if err := bind(source, target, unix.MS_SLAVE); err != nil || !readOnly {
			return err
		}
		return errors.Join(setReadOnly(target, true), setReadOnly(filepath.Join(s.shown, name), true))
	}
	if !readOnly {
		return bind(source, target, unix.MS_PRIVATE)
	}
	private := filepath.Join(s.root, "private", filepath.Base(name))
	if err := bind(source, private, unix.MS_PRIVATE); err != nil {
		return err
	}
	err := setReadOnly(private, true)
	if err == nil {
		err = bind(private, target, unix.MS_PRIVATE)
	}
	// The empty mount point stays until the sandbox ends.
	return errors.Join(err, unmount(private))
}

// Release unmounts a container's mounts, once the guest has released them.
func (s *Share) Release(cid string) error {
	var failures []error
	names := s.mounts[cid]
	delete(s.mounts, cid)
	for source, v := range s.volumes {
		delete(v.users, cid)
		if len(v.users) == 0 {
			names = append(names, v.name)
			delete(s.volumes, source)
		}
	}
	for _, name := range names {
		path := filepath.Join(s.behind, name)
		if err := unmount(path); err != nil {
			failures = append(failures, err)
			continue
		}
		// os.Remove removes only an empty mount point.
		failures = append(failures, os.Remove(path))
	}
	if err := os.Remove(filepath.Join(s.behind, cid)); err != nil && !errors.Is(err, os.ErrNotExist) {
		failures = append(failures, err)
	}
	if err := errors.Join(failures...); err != nil {
		return fmt.Errorf("remove the mounts of %s: %w", cid, err)
	}
	return nil
}

// Remove removes the whole share, after the VM and virtiofsd have exited.
func (s *Share) Remove() error { return RemoveTree(s.root) }
