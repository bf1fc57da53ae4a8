package inspect

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// maxOpenFiles bounds the list in the manifest. What is beyond it CRIU itself
// checks at restore, with a less friendly message.
const maxOpenFiles = 4096

// deletedSuffix ends the name of a file without a name, in /proc.
const deletedSuffix = " (deleted)"

// ofTheKernel are file systems whose files the kernel makes up: they come and
// go with processes, and have no size to go by.
var ofTheKernel = map[string]bool{"proc": true, "sysfs": true, "cgroup": true, "cgroup2": true}

// ShmDir is where the pod's one tmpfs for shared memory is in every container.
const ShmDir = "/dev/shm"

// leftOut are mounts whose files are no matter of ours: CRIU's images have
// them, or the kernel makes them up. A descriptor's is known by its id, and a
// mapping's by its device.
type leftOut struct {
	ids     map[int]bool
	devices map[string]bool // as /proc/PID/maps prints them
}

func newLeftOut(mounts []*mountinfo.Info) leftOut {
	l := leftOut{ids: make(map[int]bool), devices: make(map[string]bool)}
	shm := ""
	for _, m := range mounts {
		device := fmt.Sprintf("%02x:%02x", m.Major, m.Minor)
		switch {
		case m.Mountpoint == ShmDir:
			shm = device
		case m.FSType == "tmpfs" && m.Mountpoint != "/", ofTheKernel[m.FSType]:
			l.ids[m.ID], l.devices[device] = true, true
		}
	}
	delete(l.devices, shm)
	return l
}

// OpenFiles lists the regular files outside of CRIU's images that processes
// hold open or have mapped, with their sizes: CRIU restores none whose size
// differs. The processes are frozen.
func OpenFiles(pids []int, mounts []*mountinfo.Info) ([]*api.OpenFile, error) {
	leftOut := newLeftOut(mounts)
	seen := make(map[string]bool)
	var out []*api.OpenFile
	add := func(path, through string) error {
		if seen[path] || len(out) == maxOpenFiles || !strings.HasPrefix(path, "/") || strings.HasSuffix(path, deletedSuffix) {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Stat(through, &st); err != nil {
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			return &os.PathError{Op: "stat", Path: through, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink == 0 {
			return nil
		}
		seen[path] = true
		out = append(out, &api.OpenFile{Path: path, Size: uint64(st.Size)}) //nolint:gosec // not negative
		return nil
	}
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			path, err := os.Readlink(fd)
			if err != nil || leftOut.ids[mountOf(pid, filepath.Base(fd))] {
				continue
			}
			if err := add(path, fd); err != nil {
				return nil, err
			}
		}
		maps, err := mappedFiles(pid, leftOut.devices)
		if err != nil {
			return nil, err
		}
		for _, path := range maps {
			if err := add(path, fmt.Sprintf("/proc/%d/root%s", pid, path)); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// mountOf returns the id of the mount that a descriptor's file is on, or 0.
func mountOf(pid int, fd string) int {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		var id int
		if _, err := fmt.Sscanf(line, "mnt_id:\t%d", &id); err == nil {
			return id
		}
	}
	return 0
}

// mappedFiles lists the files that a process has mapped, below its own root.
// Those on the devices are left out.
func mappedFiles(pid int, devices map[string]bool) ([]string, error) {
	var out []string
	last := ""
	err := eachMapping(pid, func(m mapping) {
		if m.path == last {
			return
		}
		last = m.path
		if !devices[m.device] {
			out = append(out, m.path)
		}
	})
	return out, err
}

// mapping is a part of a process's memory that a file is behind, as
// /proc/PID/maps has it.
type mapping struct {
	addresses, permissions, device, path string
}

// eachMapping calls f with the mappings of files in a process. One that has
// ended has none.
func eachMapping(pid int, f func(mapping)) error {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer maps.Close()
	s := bufio.NewScanner(maps)
	s.Buffer(nil, 1<<16)
	for s.Scan() {
		i := strings.IndexByte(s.Text(), '/')
		if i < 0 {
			continue
		}
		// Addresses, permissions, offset, device, inode, and the path.
		if fields := strings.Fields(s.Text()[:i]); len(fields) == 5 {
			f(mapping{addresses: fields[0], permissions: fields[1], device: fields[3], path: s.Text()[i:]})
		}
	}
	if errors.Is(s.Err(), unix.ESRCH) {
		return nil // ended meanwhile
	}
	return s.Err()
}

// ChangedFiles names the files that a restore would find with another size,
// looked up below root without leaving it. Files of /dev/shm are left out: those
// that are not there come from the image set (see [ChangedShm]).
func ChangedFiles(root string, files []*api.OpenFile) ([]string, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	var out []string
	for _, f := range files {
		if strings.HasPrefix(f.GetPath(), ShmDir+"/") {
			continue
		}
		fd, err := unix.Openat2(dir, strings.TrimPrefix(f.GetPath(), "/"), &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
		if err != nil {
			out = append(out, fmt.Sprintf("%s (is gone: %v)", f.GetPath(), err))
			continue
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		if err != nil {
			return nil, &os.PathError{Op: "stat", Path: f.GetPath(), Err: err}
		}
		if uint64(st.Size) != f.GetSize() { //nolint:gosec // not negative
			out = append(out, fmt.Sprintf("%s (has %d bytes, had %d)", f.GetPath(), st.Size, f.GetSize()))
		}
	}
	return out, nil
}

// ChangedShm names the files that a restore needs of /dev/shm and would find to
// be others than those of the image set: another container of the pod has them,
// or has left them, and the pod's are never replaced.
func ChangedShm(dir string, files []*api.OpenFile) ([]string, error) {
	shm, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(shm)
	var out []string
	for _, f := range files {
		name, ok := strings.CutPrefix(f.GetPath(), ShmDir+"/")
		if !ok {
			continue
		}
		fd, err := unix.Openat2(shm, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			out = append(out, fmt.Sprintf("%s (%v)", f.GetPath(), err))
			continue
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		switch {
		case err != nil:
			return nil, &os.PathError{Op: "stat", Path: f.GetPath(), Err: err}
		case st.Mode&unix.S_IFMT != unix.S_IFREG:
			out = append(out, f.GetPath()+" (is not a file)")
		case uint64(st.Size) != f.GetSize(): //nolint:gosec // not negative
			out = append(out, fmt.Sprintf("%s (has %d bytes, had %d)", f.GetPath(), st.Size, f.GetSize()))
		}
	}
	return out, nil
}
