// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// Dir reads much about one process at a time, with few system calls. It belongs to
// one goroutine.
type Dir struct {
	pid, fd int
	// buf is what Read fills.
	buf []byte
	// target is what Link fills, and links are those that it has returned: the
	// processes of a container have most of them in common.
	target [unix.PathMax]byte
	links  map[string]string
}

// maxLinks bounds those that are remembered.
const maxLinks = 10000

// OpenDir opens the directory of a process in /proc. Its error wraps
// [fs.ErrNotExist] where there is no such process, and so do those of the methods
// once it has exited. The caller calls Close. Reuse, if not nil, is a closed Dir
// that is used no longer.
func OpenDir(pid int, reuse *Dir) (*Dir, error) {
	d := reuse
	if d == nil {
		d = &Dir{buf: make([]byte, 1<<14), links: make(map[string]string)}
	}
	d.pid = pid
	var err error
	if d.fd, err = unix.Open(path(pid), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, d.failed("open", "", err)
	}
	return d, nil
}

// Close closes it.
func (d *Dir) Close() error { return unix.Close(d.fd) }

func (d *Dir) failed(op, name string, err error) error {
	if errors.Is(err, unix.ESRCH) {
		err = fs.ErrNotExist
	}
	return &fs.PathError{Op: op, Path: path(d.pid, name), Err: err}
}

// Read reads a file, such as "maps". What it returns is valid until the next Read.
func (d *Dir) Read(name string) ([]byte, error) { return d.read(name, false) }

// ReadRecord is Read of a file that the kernel generates as one record, such as
// "status" or those in "fdinfo": with room for it, a single read returns all
// (fs/seq_file.c, single_open).
func (d *Dir) ReadRecord(name string) ([]byte, error) { return d.read(name, true) }

func (d *Dir) read(name string, record bool) ([]byte, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, d.failed("open", name, err)
	}
	defer unix.Close(fd)
	for n := 0; ; {
		if n == len(d.buf) {
			d.buf = append(d.buf, make([]byte, len(d.buf))...)
		}
		got, err := unix.Read(fd, d.buf[n:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, d.failed("read", name, err)
		}
		n += got
		if got == 0 || record && n < len(d.buf) {
			return d.buf[:n], nil
		}
	}
}

// Link reads a symbolic link, such as "ns/net".
func (d *Dir) Link(name string) (string, error) {
	n, err := unix.Readlinkat(d.fd, name, d.target[:])
	if err != nil {
		return "", d.failed("readlink", name, err)
	}
	if known, ok := d.links[string(d.target[:n])]; ok {
		return known, nil
	}
	if len(d.links) == maxLinks {
		clear(d.links)
	}
	link := string(d.target[:n])
	d.links[link] = link
	return link, nil
}

// Names lists a directory, such as "fd".
func (d *Dir) Names(name string) ([]string, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, d.failed("open", name, err)
	}
	defer unix.Close(fd)
	var names []string
	var buf [1 << 12]byte
	for {
		n, err := unix.ReadDirent(fd, buf[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, d.failed("readdir", name, err)
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// Stat is [ReadStat].
func (d *Dir) Stat() (Stat, error) {
	data, err := d.ReadRecord("stat")
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(data)
	if err != nil {
		return Stat{}, fmt.Errorf("parse %s: %w", path(d.pid, "stat"), err)
	}
	return s, nil
}

// TaskStatus is what a process's or a thread's status in /proc says of it.
type TaskStatus struct {
	// PIDs are its pids in each PID namespace, from that of /proc inwards.
	PIDs []int
	// Tracer is the pid of the process that traces it with ptrace(2), or 0.
	Tracer int
	// Threads is how many threads the process has.
	Threads int
	// Pending are the signals that are pending for the thread or for its process,
	// bit 0 the first.
	Pending uint64
}

// TaskStatus reads the status of the process, or that of a thread where name is
// task/TID/status.
func (d *Dir) TaskStatus(name string) (TaskStatus, error) {
	data, err := d.ReadRecord(name)
	if err != nil {
		return TaskStatus{}, err
	}
	s, err := parseStatus(data, d.pid)
	if err != nil {
		return TaskStatus{}, fmt.Errorf("parse %s: %w", path(d.pid, name), err)
	}
	return s, nil
}

func parseStatus(data []byte, pid int) (s TaskStatus, err error) {
	for line := range bytes.Lines(data) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch string(name) {
		case "NSpid":
			s.PIDs, err = parseNSPIDs(string(value), pid)
		case "TracerPid":
			s.Tracer, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		case "Threads":
			s.Threads, err = strconv.Atoi(string(bytes.TrimSpace(value)))
		case "SigPnd", "ShdPnd":
			var set uint64
			set, err = strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
			s.Pending |= set
		}
		if err != nil {
			return TaskStatus{}, fmt.Errorf("%s: %w", name, err)
		}
	}
	if len(s.PIDs) == 0 {
		return TaskStatus{}, errors.New("no NSpid")
	}
	return s, nil
}
