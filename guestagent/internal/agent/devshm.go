// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// CRIU's images do not contain the files of external mounts, and a restore
// fails if a file that is open in /dev/shm is missing. So these files travel in
// a tar archive. GNU tar writes it, which supports sparse files; this package
// reads it and creates only regular files, directories, links and FIFOs from
// it.

// linkRemapPattern is [linkRemapName] for tar.
const linkRemapPattern = "link_remap.[0-9]*"

// emptyArchive ends at once: with two blocks of zeros.
var emptyArchive = make([]byte, 2*512)

// saveShm archives the /dev/shm of a container that is frozen.
func saveShm(ctx context.Context, c *container, archive string) error {
	shm, err := c.openShm(c.root().PID)
	if err != nil {
		return fmt.Errorf("save /dev/shm: %w", err)
	}
	if shm == nil {
		return os.WriteFile(archive, emptyArchive, 0o600)
	}
	defer shm.Close()
	empty, err := isEmptyShm(shm)
	if err != nil {
		return fmt.Errorf("save /dev/shm: %w", err)
	}
	if empty { // as most are; tar takes a while to start
		return os.WriteFile(archive, emptyArchive, 0o600)
	}
	// By descriptor: below a path of the container, tar would follow links in the
	// guest's root.
	cmd := criu.Command(ctx, "tar", "--create", "--file", archive, "--format=pax", "--sparse", "--numeric-owner", "--xattrs", "--one-file-system",
		"--warning=no-file-ignored", "--exclude="+linkRemapPattern, "--directory", "/proc/self/fd/3", ".")
	cmd.ExtraFiles = []*os.File{shm}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := criu.Start(cmd); err != nil {
		return fmt.Errorf("save /dev/shm: %w", err)
	}
	// 1: a file or directory changed meanwhile. It belongs to another
	// container: the pod has one /dev/shm, and only this container is frozen.
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != 1 {
		return fmt.Errorf("save /dev/shm: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// isEmptyShm reports whether a directory has nothing but links that CRIU makes.
func isEmptyShm(shm *os.File) (bool, error) {
	dir, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", shm.Fd()))
	if err != nil {
		return false, err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(64)
		if errors.Is(err, io.EOF) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		for _, name := range names {
			if !linkRemapName.MatchString(name) {
				return false, nil
			}
		}
	}
}

// restoreShm extracts an archive into a /dev/shm. A file that exists belongs to
// another container of the pod and is kept.
func restoreShm(ctx context.Context, shm *os.File, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("restore /dev/shm: %w", err)
	}
	defer f.Close()
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", shm.Fd()))
	if err != nil {
		return fmt.Errorf("restore /dev/shm: %w", err)
	}
	defer root.Close()
	u := unpacker{ctx: ctx, root: root, archive: &archiveReader{f: f}}
	if err := u.unpack(); err != nil {
		return fmt.Errorf("restore /dev/shm: %w", err)
	}
	return nil
}

// unpacker extracts an archive below root, which no name can escape.
type unpacker struct {
	ctx     context.Context
	root    *os.Root
	archive *archiveReader
}

func (u *unpacker) unpack() error {
	r := tar.NewReader(u.archive)
	var directories []*tar.Header
	for {
		if u.ctx.Err() != nil {
			return context.Cause(u.ctx)
		}
		u.archive.begin()
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		name := filepath.Clean(h.Name)
		if name == "." {
			continue // the root directory belongs to the mount
		}
		h.Name = name
		made, err := u.entry(h)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if made && h.Typeflag == tar.TypeDir {
			directories = append(directories, h)
		}
	}
	// Last: creating their content changes their times.
	for _, h := range directories {
		if err := u.root.Chtimes(h.Name, h.AccessTime, h.ModTime); err != nil {
			return err
		}
	}
	return nil
}

// entry creates one entry.
func (u *unpacker) entry(h *tar.Header) (made bool, err error) {
	root := u.root
	switch h.Typeflag {
	case tar.TypeReg:
		err = u.file(h)
	case tar.TypeDir:
		err = root.Mkdir(h.Name, 0o700)
	case tar.TypeSymlink:
		err = root.Symlink(h.Linkname, h.Name)
	case tar.TypeLink:
		err = root.Link(filepath.Clean(h.Linkname), h.Name)
	case tar.TypeFifo:
		err = unpackFIFO(root, h.Name)
	default:
		return false, nil // devices and the like do not belong in /dev/shm
	}
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if h.Typeflag == tar.TypeLink {
		return true, nil
	}
	if err := root.Lchown(h.Name, h.Uid, h.Gid); err != nil {
		return false, err
	}
	if h.Typeflag == tar.TypeSymlink {
		return true, nil
	}
	// Without set-id bits, which have no effect anyway: Kata mounts it nosuid.
	if err := root.Chmod(h.Name, h.FileInfo().Mode()&(fs.ModePerm|fs.ModeSticky)); err != nil {
		return false, err
	}
	return true, root.Chtimes(h.Name, h.AccessTime, h.ModTime)
}

func (u *unpacker) file(h *tar.Header) (err error) {
	parts, err := u.archive.parts(h)
	if err != nil {
		return err
	}
	f, err := u.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, f.Close()) }()
	// Shared memory segments are often sparse, and holes cost nothing.
	if err := f.Truncate(h.Size); err != nil {
		return err
	}
	for _, p := range parts {
		if err := u.copy(f, p); err != nil {
			return err
		}
	}
	return nil
}

// copy copies a part of a file, without blocks of zeros.
func (u *unpacker) copy(f *os.File, p part) error {
	buf := make([]byte, min(1<<16, p.size))
	zero := make([]byte, len(buf))
	for done := int64(0); done < p.size; {
		if u.ctx.Err() != nil {
			return context.Cause(u.ctx)
		}
		n := min(int64(len(buf)), p.size-done)
		if _, err := io.ReadFull(io.NewSectionReader(u.archive.f, p.at+done, n), buf[:n]); err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if !bytes.Equal(buf[:n], zero[:n]) {
			if _, err := f.WriteAt(buf[:n], p.offset+done); err != nil {
				return err
			}
		}
		done += n
	}
	return nil
}

func unpackFIFO(root *os.Root, name string) error {
	parent, err := root.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	return unix.Mkfifoat(int(parent.Fd()), filepath.Base(name), 0o600)
}
