package task

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// applyRootfsDiff applies the changes of the root file system that lie beside
// an image set, if they do. containerd does so itself after Create, into a
// mount that with Kata is in the shim's mount namespace only: they would be lost.
func applyRootfsDiff(ctx context.Context, checkpoint string, mounts []*types.Mount) error {
	if bundle.IsTemporary(checkpoint) {
		return nil // what lies beside it is anybody's
	}
	f, err := openOwn(filepath.Join(filepath.Dir(filepath.Clean(checkpoint)), imageset.RootfsDiffName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("apply the changes of the root file system: %w", err)
	}
	defer f.Close()
	if err := inMountNamespace(func(target string) (err error) {
		if err := mount.All(mount.FromProto(mounts), target); err != nil {
			return fmt.Errorf("mount: %w", err)
		}
		defer func() { err = errors.Join(err, mount.UnmountMounts(mount.FromProto(mounts), target, 0)) }()
		r, err := compression.DecompressStream(f)
		if err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
		defer r.Close()
		if _, err := archive.Apply(ctx, target, r, archive.WithFilter(withoutAuthority(ctx))); err != nil {
			return fmt.Errorf("%s: %w", f.Name(), err)
		}
		return nil
	}); err != nil {
		return fmt.Errorf("apply the changes of the root file system: %w", err)
	}
	return nil
}

// withoutAuthority lets through what changes files, and nothing that gives a
// process more rights than the container has: device nodes are left out, and
// files come without set-user-ID, set-group-ID and capabilities. An archive can
// have been made by anybody.
func withoutAuthority(ctx context.Context) archive.Filter {
	return func(h *tar.Header) (bool, error) {
		switch h.Typeflag {
		case tar.TypeChar, tar.TypeBlock:
			log.G(ctx).WithField("file", h.Name).Warn("a device node among the changes of the root file system is left out")
			return false, nil
		case tar.TypeReg:
			const setID = 0o6000
			if h.Mode&setID != 0 {
				log.G(ctx).WithField("file", h.Name).Warn("a file among the changes of the root file system comes without set-ID bits")
				h.Mode &^= setID
			}
		}
		for key := range h.PAXRecords {
			if !strings.HasPrefix(key, paxXattr) || strings.HasPrefix(key, paxXattr+"user.") {
				continue
			}
			log.G(ctx).WithFields(log.Fields{"file": h.Name, "attribute": strings.TrimPrefix(key, paxXattr)}).Warn("an attribute among the changes of the root file system is left out")
			delete(h.PAXRecords, key)
		}
		return true, nil
	}
}

// paxXattr precedes the names of extended attributes in archives.
const paxXattr = "SCHILY.xattr."

// openOwn opens a regular file that nobody but this user, who is root, could
// have put there.
func openOwn(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || !st.Mode().IsRegular() || int(sys.Uid) != os.Geteuid() {
		return nil, errors.Join(fmt.Errorf("%s is not a regular file of this user", path), f.Close())
	}
	return f, nil
}

// inMountNamespace calls f on a thread with a mount namespace of its own, with
// an empty directory to mount on: whatever happens, no mount is left over.
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
	return errors.Join(err, os.Remove(target))
}
