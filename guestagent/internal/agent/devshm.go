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

// saveShm archives the /dev/shm of a frozen process.
func saveShm(ctx context.Context, pid int, archive string) error {
	dir := fmt.Sprintf("/proc/%d/root/dev/shm", pid)
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		// The container has no /dev/shm: the archive is empty.
		return os.WriteFile(archive, make([]byte, 1024), 0o600)
	}
	cmd := criu.Command(ctx, "tar", "--create", "--file", archive, "--format=pax", "--sparse", "--numeric-owner", "--xattrs", "--one-file-system",
		"--warning=no-file-ignored", "--exclude="+linkRemapPattern, "--directory", dir, ".")
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

// restoreShm extracts an archive into a /dev/shm. A file that exists belongs to
// another container of the pod and is kept.
func restoreShm(dir, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("restore /dev/shm: %w", err)
	}
	defer f.Close()
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("restore /dev/shm: %w", err)
	}
	defer root.Close()
	r := tar.NewReader(f)
	var directories []*tar.Header
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("restore /dev/shm: read archive: %w", err)
		}
		name := filepath.Clean(h.Name)
		if name == "." {
			continue // the root directory belongs to the mount
		}
		h.Name = name
		made, err := unpack(root, h, r)
		if err != nil {
			return fmt.Errorf("restore /dev/shm: %s: %w", name, err)
		}
		if made && h.Typeflag == tar.TypeDir {
			directories = append(directories, h)
		}
	}
	// Last: creating their content changes their times.
	for _, h := range directories {
		if err := root.Chtimes(h.Name, h.AccessTime, h.ModTime); err != nil {
			return fmt.Errorf("restore /dev/shm: %w", err)
		}
	}
	return nil
}

// unpack creates one entry below root, which no name can escape.
func unpack(root *os.Root, h *tar.Header, content io.Reader) (made bool, err error) {
	switch h.Typeflag {
	case tar.TypeReg:
		err = unpackFile(root, h, content)
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

func unpackFile(root *os.Root, h *tar.Header, content io.Reader) (err error) {
	f, err := root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, f.Close()) }()
	if err := f.Truncate(h.Size); err != nil {
		return err
	}
	// Holes stay holes: shared memory segments are often sparse.
	buf := make([]byte, 1<<16)
	zero := make([]byte, len(buf))
	for off := int64(0); off < h.Size; {
		n, err := io.ReadFull(content, buf[:min(int64(len(buf)), h.Size-off)])
		if err != nil {
			return err
		}
		if !bytes.Equal(buf[:n], zero[:n]) {
			if _, err := f.WriteAt(buf[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
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
