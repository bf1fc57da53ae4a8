package guestagent

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/api"
)

// maxOpenFiles bounds the list in the manifest. What is beyond it CRIU itself
// checks at restore, with a less friendly message.
const maxOpenFiles = 4096

// deletedSuffix ends the name of a file without a name, in /proc.
const deletedSuffix = " (deleted)"

// ofTheKernel are file systems whose files the kernel makes up: they come and
// go with processes, and have no size to go by.
var ofTheKernel = map[string]bool{"proc": true, "sysfs": true, "cgroup": true, "cgroup2": true}

// openFiles lists the regular files outside of the image set that processes
// hold open or have mapped, with their sizes: CRIU restores none whose size
// differs. The processes are frozen.
func openFiles(pids []int, mounts []*mountinfo.Info) ([]*api.OpenFile, error) {
	leftOut := make(map[int]bool)
	for _, m := range mounts {
		if m.FSType == "tmpfs" && m.Mountpoint != "/" || ofTheKernel[m.FSType] {
			leftOut[m.ID] = true
		}
	}
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
			if err != nil || leftOut[mountOf(pid, filepath.Base(fd))] {
				continue
			}
			if err := add(path, fd); err != nil {
				return nil, err
			}
		}
		maps, err := mappedFiles(pid)
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
func mappedFiles(pid int) ([]string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<16)
	last := ""
	for s.Scan() {
		i := strings.IndexByte(s.Text(), '/')
		if i < 0 || s.Text()[i:] == last {
			continue
		}
		last = s.Text()[i:]
		if !strings.HasPrefix(last, "/dev/shm/") {
			out = append(out, last)
		}
	}
	return out, s.Err()
}

// changedFiles names the files that a restore would find with another size,
// looked up below root without leaving it. Files of /dev/shm come from the
// image set and are left out.
func changedFiles(root string, files []*api.OpenFile) ([]string, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	var out []string
	for _, f := range files {
		if strings.HasPrefix(f.GetPath(), "/dev/shm/") {
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
