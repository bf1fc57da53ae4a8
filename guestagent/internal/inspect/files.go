// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// maxOpenFiles bounds the list in the manifest. CRIU itself checks the files
// beyond it at restore, with a less friendly message.
const maxOpenFiles = 4096

// deletedSuffix ends the name of an unlinked file in /proc.
const deletedSuffix = " (deleted)"

// generatedFS are file systems whose files the kernel generates: they come and
// go with processes and have no meaningful size.
var generatedFS = map[string]bool{"proc": true, "sysfs": true, "cgroup": true, "cgroup2": true}

// ShmDir is where every container of a pod has the pod's tmpfs for shared
// memory.
const ShmDir = "/dev/shm"

// skippedMounts are mounts whose files need no check: CRIU's images contain
// them, or the kernel generates them. A descriptor's mount is known by its id,
// and a mapping's by its device.
type skippedMounts struct {
	ids     map[int]bool
	devices map[string]bool // as /proc/PID/maps prints them
}

func newSkippedMounts(mounts []*mountinfo.Info) skippedMounts {
	l := skippedMounts{ids: make(map[int]bool), devices: make(map[string]bool)}
	shm := ""
	for _, m := range mounts {
		device := device(m)
		switch {
		case m.Mountpoint == ShmDir:
			shm = device
		case m.FSType == "tmpfs" && m.Mountpoint != "/", generatedFS[m.FSType]:
			l.ids[m.ID], l.devices[device] = true, true
		}
	}
	delete(l.devices, shm)
	return l
}

// OpenFiles lists the regular files that processes have open or mapped and that
// CRIU's images do not contain, with their sizes: CRIU restores no process
// whose file has another size, unless the file is only appended to. The
// processes are frozen, and files that may not answer are left out, and those of
// a mount namespace below the container's that init does not see under their
// names: CRIU checks those alone.
func (c *Container) OpenFiles(ctx context.Context) ([]*api.OpenFile, error) {
	skipped := newSkippedMounts(c.mounts.root)
	seen := make(map[string]*api.OpenFile)
	var out []*api.OpenFile
	add := func(path, link string, appends bool) error {
		if file := seen[path]; file != nil {
			file.MayGrow = file.MayGrow && appends
			return nil
		}
		if len(out) == maxOpenFiles || !strings.HasPrefix(path, "/") || strings.HasSuffix(path, deletedSuffix) {
			return nil
		}
		if err := ended(ctx); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(link, &st); err != nil {
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			return &os.PathError{Op: "stat", Path: link, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink == 0 {
			return nil
		}
		seen[path] = &api.OpenFile{Path: []byte(path), Size: uint64(st.Size), MayGrow: appends} //nolint:gosec // not negative
		out = append(out, seen[path])
		return nil
	}
	seenByInit := make(map[string]bool)
	for _, m := range c.mounts.root {
		seenByInit[device(m)] = true
	}
	for _, p := range c.Processes {
		nested := p.mountNamespace != c.Root.mountNamespace
		for _, f := range p.Files {
			// A process may have a file open of a mount namespace that it is not in.
			m := c.mounts.mountOf(f)
			if m != nil && !c.mounts.inInit(m) {
				m = c.mounts.inRoot(m)
			}
			if m == nil || skipped.ids[m.ID] || !c.mounts.answers(m) {
				continue
			}
			if err := add(f.Name, fmt.Sprintf("/proc/%d/fd/%d", p.PID, f.FD), f.appends()); err != nil {
				return nil, err
			}
		}
		if nested {
			continue // which mount a mapping is on, the kernel does not say
		}
		for _, m := range p.Mappings {
			if skipped.devices[m.Device] || !seenByInit[m.Device] || !c.mounts.answers(c.mounts.deviceOf(m)) {
				continue
			}
			if err := add(m.Path, fmt.Sprintf("/proc/%d/map_files/%s", p.PID, m.Addresses), false); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// RootIsShared reports whether the host shares the root file system of init with
// the guest, and whether that file system is known to answer.
func (c *Container) RootIsShared() (shared, answers bool) {
	for _, m := range c.mounts.root {
		if m.Mountpoint == "/" {
			return inside.KindOf(m) == inside.Host, c.mounts.answers(m)
		}
	}
	return false, false
}

// WrittenFile is a file that a process has open for writing or has mapped
// shared.
type WrittenFile struct {
	// PID is that of the process, and FD its descriptor, -1 for a mapping.
	PID, FD int
	// Link is the file's link in /proc.
	Link string
}

// Open returns a descriptor of the file, which the caller closes. It is a copy
// of the process's own where it has one: to open the file again would break a
// lease that the process may have on it (fcntl(2), F_SETLEASE), and the signal
// that tells the process so is deadly by default.
func (f WrittenFile) Open() (int, error) {
	if f.FD < 0 {
		fd, err := unix.Open(f.Link, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: f.Link, Err: err}
		}
		return fd, nil
	}
	process, err := pidfd.Open(f.PID)
	if err != nil {
		return -1, err
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, f.FD, 0)
	return fd, os.NewSyscallError("pidfd_getfd", err)
}

// WrittenFiles lists the regular files shared by the host that processes have
// open for writing or have mapped shared, each once. Unlinked files are left
// out.
func (c *Container) WrittenFiles(ctx context.Context) ([]WrittenFile, error) {
	return c.writtenFiles(ctx, func(m *mountinfo.Info) bool { return m != nil && inside.KindOf(m) == inside.Host })
}

func (c *Container) writtenFiles(ctx context.Context, on func(*mountinfo.Info) bool) (out []WrittenFile, _ error) {
	seen := make(map[inode]bool)
	add := func(f WrittenFile) error {
		if err := ended(ctx); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(f.Link, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink == 0 {
			return nil //nolint:nilerr // closed or exited meanwhile
		}
		if i := (inode{st.Dev, st.Ino}); !seen[i] {
			seen[i] = true
			out = append(out, f)
		}
		return nil
	}
	// Descriptors before mappings: they need not be opened.
	for _, p := range c.Processes {
		for _, f := range p.Files {
			if !f.writable() || !on(c.mounts.mountOf(f)) {
				continue
			}
			if err := add(WrittenFile{p.PID, f.FD, fmt.Sprintf("/proc/%d/fd/%d", p.PID, f.FD)}); err != nil {
				return nil, err
			}
		}
	}
	for _, p := range c.Processes {
		for _, m := range p.Mappings {
			if !m.Shared || !on(c.mounts.deviceOf(m)) { // whether or not it is writable right now
				continue
			}
			if err := add(WrittenFile{p.PID, -1, fmt.Sprintf("/proc/%d/map_files/%s", p.PID, m.Addresses)}); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// ChangedFiles names the files that a restore would find with another size, in
// the container's tree. Files of /dev/shm are left out: the missing ones come
// from the image set (see [ChangedShm]).
func ChangedFiles(tree *inside.Tree, files []*api.OpenFile) ([]string, error) {
	var out []string
	for _, f := range files {
		path := string(f.GetPath())
		if strings.HasPrefix(path, ShmDir+"/") {
			continue
		}
		fd, err := tree.Open(path, unix.O_PATH)
		if errors.Is(err, inside.ErrMayBlock) {
			continue // CRIU checks it
		}
		if err != nil {
			out = append(out, fmt.Sprintf("%s (is gone: %v)", shown(path), errors.Unwrap(err)))
			continue
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		if err != nil {
			return nil, &os.PathError{Op: "stat", Path: path, Err: err}
		}
		if !f.GetMayGrow() && uint64(st.Size) != f.GetSize() { //nolint:gosec // not negative
			out = append(out, fmt.Sprintf("%s (has %d bytes, had %d)", shown(path), st.Size, f.GetSize()))
		}
	}
	return out, nil
}

// ChangedShm names the files of /dev/shm, by a descriptor of it, that a restore
// needs and that differ from those of the image set: another container of the
// pod owns them, or has left them, and files that exist are never replaced.
func ChangedShm(shm int, files []*api.OpenFile) ([]string, error) {
	var out []string
	for _, f := range files {
		path := string(f.GetPath())
		name, ok := strings.CutPrefix(path, ShmDir+"/")
		if !ok {
			continue
		}
		fd, err := unix.Openat2(shm, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			out = append(out, fmt.Sprintf("%s (%v)", shown(path), err))
			continue
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		switch {
		case err != nil:
			return nil, &os.PathError{Op: "stat", Path: path, Err: err}
		case st.Mode&unix.S_IFMT != unix.S_IFREG:
			out = append(out, shown(path)+" (is not a file)")
		case !f.GetMayGrow() && uint64(st.Size) != f.GetSize(): //nolint:gosec // not negative
			out = append(out, fmt.Sprintf("%s (has %d bytes, had %d)", shown(path), st.Size, f.GetSize()))
		}
	}
	return out, nil
}

// shown is a name of a container's in a message.
func shown(name string) string { return text.Line(name, text.MaxName) }
