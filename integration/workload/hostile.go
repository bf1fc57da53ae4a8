// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// hostile does in an exchange directory what no guest agent does, as the
// guest's root. It prints [HostileLine] when it has done so.
type hostile struct {
	dir, what string
	n         int
	limit     time.Duration
}

// HostileLine is printed when something was done, or found to be forbidden.
const HostileLine = "did"

func (h *hostile) run(w io.Writer) error {
	deeds := map[string]func() error{
		"write": h.write, "files": h.files, "bytes": h.bytes, "deep": h.deep, "hold": func() error { return h.hold(w) },
		"device": h.spoil(func(dir string) error {
			return unix.Mknod(filepath.Join(dir, "core-4711.img"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) // /dev/zero
		}),
		"fifo":      h.spoil(func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "core-4711.img"), 0o600) }),
		"symlink":   h.spoil(func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "core-4711.img")) }),
		"hard-link": h.spoil(func(dir string) error { return h.other(dir, "core-4711.img") }),
		"manifest": h.spoil(func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "kata-checkpoint.json"), []byte("{}"), 0o600)
		}),
		"hole": h.spoil(func(dir string) error { return hole(filepath.Join(dir, "pages-4711.img"), int64(h.n)) }),
		"race": h.spoil(h.race),
	}
	do := deeds[h.what]
	if do == nil {
		return fmt.Errorf("unknown deed %q", h.what)
	}
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", h.what, err)
	}
	_, err := fmt.Fprintln(w, HostileLine, h.what)
	return err
}

// write tries to write, which has to be impossible.
func (h *hostile) write() error {
	for _, try := range []func() error{
		func() error { return os.WriteFile(filepath.Join(h.dir, "new"), nil, 0o600) },
		func() error { return os.Mkdir(filepath.Join(h.dir, "new"), 0o700) },
		func() error { return os.WriteFile(filepath.Join(h.dir, ".exchange"), []byte("more"), 0o600) },
		func() error { return os.Truncate(filepath.Join(h.dir, ".exchange"), 1<<40) },
		func() error { return os.Chmod(h.dir, 0o777) },
		func() error { return unix.Mknod(filepath.Join(h.dir, "new"), unix.S_IFCHR, int(unix.Mkdev(1, 5))) },
	} {
		if err := try(); !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("it is not read-only, but: %v", err) //nolint:errorlint // it may be none
		}
	}
	return nil
}

func (h *hostile) files() error {
	dir := filepath.Join(h.dir, "many")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for i := range h.n {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
			return stopped(err)
		}
	}
	return nil
}

func (h *hostile) bytes() error {
	f, err := os.Create(filepath.Join(h.dir, "large"))
	if err != nil {
		return err
	}
	defer f.Close()
	block := []byte(strings.Repeat("x", 1<<20))
	for range h.n {
		if _, err := f.Write(block); err != nil {
			return stopped(err)
		}
	}
	return nil
}

// stopped accepts the errors of a directory that the host has removed or made
// read-only.
func stopped(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
		return nil
	}
	return err
}

func (h *hostile) deep() error {
	fd, err := unix.Open(h.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	for range h.n {
		if err := unix.Mkdirat(fd, "d", 0o700); err != nil {
			return stopped(err)
		}
		next, err := unix.Openat(fd, "d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return stopped(err)
		}
		unix.Close(fd)
		fd = next
	}
	return unix.Close(fd)
}

// hold keeps a file open for writing.
func (h *hostile) hold(w io.Writer) error {
	f, err := os.Create(filepath.Join(h.dir, "held"))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := fmt.Fprintln(w, HostileLine, h.what); err != nil {
		return err
	}
	for begin := time.Now(); time.Since(begin) < h.limit; time.Sleep(time.Second) { //nolint:forbidigo // it is what it does
		if _, err := f.WriteString("more"); err != nil {
			return err
		}
	}
	return nil
}

// spoil returns a function that waits for an image set and calls f with its
// directory.
func (h *hostile) spoil(f func(dir string) error) func() error {
	return func() error {
		for begin := time.Now(); time.Since(begin) < h.limit; time.Sleep(time.Millisecond) { //nolint:forbidigo // the pause between two checks
			found, err := filepath.Glob(filepath.Join(h.dir, "checkpoint-*"))
			if err != nil {
				return err
			}
			if len(found) > 0 {
				return f(found[0])
			}
		}
		return errors.New("there was no checkpoint")
	}
}

// other gives the first image another name.
func (h *hostile) other(dir, name string) error {
	for begin := time.Now(); time.Since(begin) < h.limit; time.Sleep(time.Millisecond) { //nolint:forbidigo // the pause between two checks
		found, err := filepath.Glob(filepath.Join(dir, "*.img"))
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return os.Link(found[0], filepath.Join(dir, name))
		}
	}
	return errors.New("there were no images")
}

func hole(path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// race exchanges each image with a device and back, again and again, until the
// image set is gone.
func (h *hostile) race(dir string) error {
	device := filepath.Join(h.dir, "device")
	if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil {
		return err
	}
	times := 0
	for begin := time.Now(); time.Since(begin) < h.limit; {
		images, err := filepath.Glob(filepath.Join(dir, "*.img"))
		if err != nil {
			return err
		}
		if _, err := os.Stat(dir); err != nil {
			if times == 0 {
				return errors.New("there were no images")
			}
			return nil
		}
		for _, image := range images {
			for range 2 {
				if unix.Renameat2(unix.AT_FDCWD, image, unix.AT_FDCWD, device, unix.RENAME_EXCHANGE) == nil {
					times++
				}
			}
		}
	}
	return errors.New("the image set is still there")
}

// limitFiles sets the soft limit of open files of a process, as the guest's root.
func limitFiles(pid int, files uint64) error {
	var l unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &l); err != nil {
		return err
	}
	l.Cur = min(files, l.Max)
	return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &l, nil)
}
