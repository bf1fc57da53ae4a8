// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// shareDir is where both of Kata's shims make the directory tree that a
// sandbox shares with its guest (src/runtime/virtcontainers/fs_share_linux.go,
// src/runtime-rs/crates/resource/src/share_fs/utils.rs).
const shareDir = "/run/kata-containers/shared/sandboxes"

// vmDirs are where Kata's Go and Rust shims keep the sockets of a VM. A shim
// that is killed while it boots the VM leaves them behind, and then the Go shim
// cannot boot another one of the same name: its virtiofsd socket is in use.
var vmDirs = []string{"/run/vc/vm", "/run/kata"}

// Sweep removes what Kata leaves of a sandbox: the mount points, empty
// directories and files, of containers that were created and never started, and
// the sockets of a VM that never ran. It removes nothing else, and nothing at
// all while something is mounted there. Kata's shim and the VM must have
// exited.
func Sweep(sandbox string) error {
	name := filepath.Base(sandbox)
	err := sweep(filepath.Join(shareDir, name))
	for _, dir := range vmDirs {
		err = errclass.Join(err, sweep(filepath.Join(dir, name)))
	}
	return err
}

// SweepMount removes the empty file that Kata's Go shim leaves, until the
// sandbox ends, for every file that it shares read-only with a container: a
// temporary mount point (src/runtime/virtcontainers/fs_share_linux.go,
// ShareFile). destination is that of the mount in the container.
func SweepMount(sandbox, container, destination string) error {
	return sweepMount(filepath.Join(shareDir, filepath.Base(sandbox), "private"), container, destination)
}

func sweepMount(dir, container, destination string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		// CONTAINER-RANDOM-NAME, where RANDOM is 8 bytes in hexadecimal.
		random, ours := strings.CutPrefix(e.Name(), container+"-")
		random, named := strings.CutSuffix(random, "-"+filepath.Base(destination))
		if _, err := hex.DecodeString(random); !ours || !named || len(random) != 16 || err != nil {
			continue
		}
		if st, ierr := e.Info(); ierr != nil || !st.Mode().IsRegular() || st.Size() > 0 {
			continue // gone, or mounted
		}
		err = errclass.Join(err, os.Remove(filepath.Join(dir, e.Name())))
	}
	return err
}

func sweep(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("sweep %s: %w", dir, err)
	}
	if len(mounts) > 0 {
		return fmt.Errorf("sweep %s: %s is mounted", dir, mounts[0].Mountpoint)
	}
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("sweep %s: %w", dir, err)
	}
	defer root.Close()
	var dirs []string
	err = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // gone already, or not ours to read
		}
		if d.IsDir() {
			dirs = append(dirs, path)
			return nil
		}
		if st, err := d.Info(); err == nil && (st.Mode().IsRegular() && st.Size() == 0 || st.Mode()&fs.ModeSocket != 0) {
			_ = root.Remove(path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		_ = root.Remove(d) // fails where something is left
	}
	os.Remove(dir)
	return err
}
