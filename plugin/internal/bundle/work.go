// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
)

// LogDir is the directory of a bundle for CRIU's log of the last checkpoint that
// failed, if its caller has given no other.
const LogDir = "kata-checkpoint.criu"

// CRIWorkPath is where the CRI looks for CRIU's log and statistics after a
// checkpoint, "" if unknown: the directory ctrd-checkpoint of the container if
// there is one, otherwise the container's directory, for versions that expect
// stats-dump there (containerd before 2.1.9, 2.2.5 and 2.3.2).
func CRIWorkPath(dir string) string {
	// The link is to <root>/io.containerd.runtime.v2.task/<namespace>/<id>.
	work, err := os.Readlink(filepath.Join(dir, "work"))
	if err != nil {
		return ""
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(work)))
	container := filepath.Join(root, "io.containerd.grpc.v1.cri", "containers", filepath.Base(work))
	for _, d := range []string{filepath.Join(container, "ctrd-checkpoint"), container} {
		if st, err := os.Stat(d); err == nil && st.IsDir() {
			return d
		}
	}
	return ""
}

// EmptyRootfs removes the files in a bundle's rootfs, unless something is
// mounted on it or below. containerd up to 2.3 applies a checkpoint's root file
// system diff there (core/runtime/v2/shim.go). With Kata the root file system
// is only mounted in the shim's mount namespace, so that these files stay
// behind and keep containerd from removing the bundle.
func EmptyRootfs(dir string) error {
	rootfs := filepath.Join(dir, "rootfs")
	entries, err := os.ReadDir(rootfs)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("empty the bundle's rootfs: %w", err)
	}
	// Mounted files do not belong to the bundle.
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(rootfs))
	if err != nil {
		return fmt.Errorf("empty the bundle's rootfs: %w", err)
	}
	if len(mounts) > 0 {
		return nil
	}
	for _, e := range entries {
		err = errclass.Join(err, remove.All(filepath.Join(rootfs, e.Name())))
	}
	if err != nil {
		return fmt.Errorf("empty the bundle's rootfs: %w", err)
	}
	return nil
}

// temporaryName is our file in the bundle that names containerd's unpacked copy
// of a checkpoint, which nobody else removes.
const temporaryName = "kata-checkpoint.temporary"

// SetTemporary notes where containerd has unpacked a checkpoint, or that it is
// removed.
func SetTemporary(dir, path string) error { return setNote(filepath.Join(dir, temporaryName), path) }

// Temporary is what SetTemporary has noted.
func Temporary(dir string) (string, error) {
	path, err := os.ReadFile(filepath.Join(dir, temporaryName))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(path), err
}

func setNote(note, text string) error {
	if text != "" {
		return replaceFile(note, []byte(text))
	}
	if err := os.Remove(note); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
