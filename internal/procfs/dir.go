// SPDX-License-Identifier: Apache-2.0

package procfs

import (
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
}

// OpenDir opens the directory of a process in /proc. Its error wraps
// [fs.ErrNotExist] where there is no such process, and so do those of the methods
// once it has exited. The caller calls Close. Reuse, if not nil, is a closed Dir
// that is used no longer.
func OpenDir(pid int, reuse *Dir) (*Dir, error) {
	d := &Dir{pid: pid}
	if reuse != nil {
		d.buf = reuse.buf
	}
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
func (d *Dir) Read(name string) ([]byte, error) {
	fd, err := unix.Openat(d.fd, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, d.failed("open", name, err)
	}
	defer unix.Close(fd)
	if d.buf == nil {
		d.buf = make([]byte, 1<<14)
	}
	for n := 0; ; {
		if n == len(d.buf) {
			d.buf = append(d.buf, make([]byte, len(d.buf))...)
		}
		got, err := unix.Read(fd, d.buf[n:])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, d.failed("read", name, err)
		case got == 0:
			return d.buf[:n], nil
		default:
			n += got
		}
	}
}

// Link reads a symbolic link, such as "ns/net".
func (d *Dir) Link(name string) (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(d.fd, name, buf[:])
	if err != nil {
		return "", d.failed("readlink", name, err)
	}
	return string(buf[:n]), nil
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
	data, err := d.Read("stat")
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(data)
	if err != nil {
		return Stat{}, fmt.Errorf("parse %s: %w", path(d.pid, "stat"), err)
	}
	return s, nil
}

// Identity returns what [NSPIDs] does, and the pid of the process that traces this
// one with ptrace(2), or 0.
func (d *Dir) Identity() (pids []int, tracer int, err error) {
	data, err := d.Read("status")
	if err != nil {
		return nil, 0, err
	}
	value, err := statusField(data, d.pid, "NSpid")
	if err == nil {
		pids, err = parseNSPIDs(value, d.pid)
	}
	if err != nil {
		return nil, 0, err
	}
	if value, err = statusField(data, d.pid, "TracerPid"); err != nil {
		return nil, 0, err
	}
	if tracer, err = strconv.Atoi(value); err != nil {
		return nil, 0, fmt.Errorf("TracerPid of process %d: %w", d.pid, err)
	}
	return pids, tracer, nil
}
