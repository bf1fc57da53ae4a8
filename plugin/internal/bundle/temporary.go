// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
)

// RemoveTemporary removes the directory into which containerd unpacked a
// checkpoint for us, which it never does itself, or took one from us, which it
// does unless it is killed (plugins/services/tasks/local.go, Create and
// getCheckpointPath). Anything else that was named as a checkpoint is left
// alone.
func RemoveTemporary(path string) error {
	if !IsTemporary(path) {
		return nil
	}
	st, err := os.Lstat(path)
	if err != nil || !st.IsDir() || st.Mode().Perm() != 0o700 {
		return nil //nolint:nilerr // none that containerd has made
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() {
		return nil
	}
	return remove.All(path)
}

// IsTemporary reports whether containerd made the name for a copy of its own.
func IsTemporary(path string) bool {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = os.TempDir()
	}
	name, found := strings.CutPrefix(filepath.Base(path), "ctrd-checkpoint")
	return found && name != "" && strings.Trim(name, "0123456789") == "" && filepath.Clean(filepath.Dir(path)) == filepath.Clean(dir)
}
