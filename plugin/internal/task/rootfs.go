// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	layer "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/archive"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// applyRootfsDiff applies the root file system diff next to an image set, if
// there is one. containerd also does so, after Create, but with Kata the mount
// that it means exists in the mount namespace of Kata's shim only, so that the
// changes would be lost.
//
// The limits are those of the image set, except that a diff may have more files.
func applyRootfsDiff(ctx context.Context, checkpoint string, mounts []*types.Mount, limits budget.Limits) error {
	if bundle.IsTemporary(checkpoint) {
		return nil // anybody may have put a file next to it
	}
	f, err := openOwn(filepath.Join(filepath.Dir(filepath.Clean(checkpoint)), imageset.RootfsDiffName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return errcode.RootfsDiff.Errorf("apply the root file system diff: %w", err)
	}
	defer f.Close()
	limits.Files = maxRootfsFiles
	if err := inMountNamespace(func(target string) (err error) {
		if err := mount.All(mount.FromProto(mounts), target); err != nil {
			return fmt.Errorf("mount: %w", err)
		}
		defer func() { err = errclass.Join(err, mount.UnmountMounts(mount.FromProto(mounts), target, 0)) }()
		if err := applyDiff(ctx, f, target, limits); err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
		return nil
	}); err != nil {
		return errcode.RootfsDiff.Errorf("apply the root file system diff: %w", err)
	}
	return nil
}

// hasRootfsDiff reports whether there may be a diff that [applyRootfsDiff] applies.
func hasRootfsDiff(checkpoint string) bool {
	if bundle.IsTemporary(checkpoint) {
		return false
	}
	_, err := os.Lstat(filepath.Join(filepath.Dir(filepath.Clean(checkpoint)), imageset.RootfsDiffName))
	return !errors.Is(err, fs.ErrNotExist)
}

// maxRootfsFiles bounds the entries of a root file system diff.
const maxRootfsFiles = 1 << 20

// applyDiff applies an archive, which may be compressed, to a directory.
func applyDiff(ctx context.Context, diff io.Reader, target string, limits budget.Limits) error {
	top, err := os.Open(target)
	if err != nil {
		return err
	}
	defer top.Close()
	r, err := archive.Decompress(ctx, diff)
	if err != nil {
		return err
	}
	defer r.Close()
	authority, room := withoutAuthority(ctx), budget.NewRoom(top, limits.Reserve)
	_, err = layer.Apply(ctx, target, r, layer.WithFilter(func(h *tar.Header) (bool, error) {
		// The size is that of the file, of which only a part may be in the archive.
		if err := limits.Take(h.Size); err != nil {
			return false, err
		}
		if err := room.Check(h.Size); err != nil {
			return false, err
		}
		return authority(h)
	}))
	return err
}

// withoutAuthority filters what would give a process more privileges than the
// container has, because anybody may have made the archive: it drops device
// nodes and clears set-user-ID bits, set-group-ID bits and file capabilities.
// It does so for every type of entry: the mode of a hard link becomes that of
// the file that it leads to. A directory keeps the bit by which it passes its
// group on.
func withoutAuthority(ctx context.Context) layer.Filter {
	return func(h *tar.Header) (bool, error) {
		allowed := int64(0o1777)
		switch h.Typeflag {
		case tar.TypeChar, tar.TypeBlock:
			log.G(ctx).WithField("file", h.Name).Warn("dropped device node from root file system diff")
			return false, nil
		case tar.TypeXGlobalHeader:
			return false, nil
		case tar.TypeDir:
			allowed |= unix.S_ISGID
		case tar.TypeReg, tar.TypeLink, tar.TypeSymlink, tar.TypeFifo:
		default:
			return false, fmt.Errorf("%q is an entry of type %q, which no root file system diff has", h.Name, h.Typeflag)
		}
		if h.Mode&^allowed&(unix.S_ISUID|unix.S_ISGID) != 0 {
			log.G(ctx).WithField("file", h.Name).Warn("cleared set-ID bits of file in root file system diff")
		}
		h.Mode &= allowed
		for key := range h.PAXRecords {
			if !strings.HasPrefix(key, paxXattr) || strings.HasPrefix(key, paxXattr+"user.") {
				continue
			}
			log.G(ctx).WithFields(log.Fields{"file": h.Name, "attribute": strings.TrimPrefix(key, paxXattr)}).Warn("dropped extended attribute from root file system diff")
			delete(h.PAXRecords, key)
		}
		return true, nil
	}
}

// paxXattr is the prefix of extended attributes' names in tar archives.
const paxXattr = "SCHILY.xattr."

// openOwn opens a regular file that belongs to this user, who is root.
func openOwn(path string) (*os.File, error) {
	f, st, err := regular.Open(unix.AT_FDCWD, path, 0)
	if err == nil && int(st.Uid) != os.Geteuid() {
		return nil, errclass.Join(fmt.Errorf("%s does not belong to this user", path), f.Close())
	}
	return f, err
}

// inMountNamespace calls f in a new mount namespace, with an empty directory to
// mount on, so that no mount is ever left over.
func inMountNamespace(f func(target string) error) error {
	target, err := os.MkdirTemp("", "kata-checkpoint-rootfs-")
	if err != nil {
		return err
	}
	err = thread.Do(func() error { // the namespace ends with the thread
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return os.NewSyscallError("mount", err)
		}
		return f(target)
	})
	return errclass.Join(err, os.Remove(target))
}
