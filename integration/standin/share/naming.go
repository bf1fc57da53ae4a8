// SPDX-License-Identifier: Apache-2.0

package share

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// passthrough is the Rust way's directory level between the share and its
// content.
const passthrough = "passthrough"

// sandboxMounts is the directory of the operator's sandbox_bind_mounts.
const sandboxMounts = "sandbox-mounts"

// volumeName returns a volume's name in the share: derived from the container
// and the destination in the Go way, from the source in the Rust way, where all
// containers of a sandbox share a volume with the same source.
func volumeName(w way.Way, cid string, m specs.Mount, random string) string {
	if w == way.Rust {
		return fmt.Sprintf("sandbox-%s-%s", random[:8], filepath.Base(m.Source))
	}
	return fmt.Sprintf("%s-%s-%s", cid, random, filepath.Base(m.Destination))
}

func randomHex() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// travels reports whether a mount of a container's spec is shared with the
// guest. All others stay in the spec unchanged and are resolved in the guest: a
// source that exists only on the host fails there.
func travels(w way.Way, m specs.Mount) bool {
	if m.Type != "bind" || m.Destination == "/dev/shm" || below(m.Source, "/proc") || below(m.Source, "/sys") {
		return false
	}
	if w == way.Rust {
		// The Rust shim checks the destination, and checks it on the host
		// (src/runtime-rs/crates/resource/src/volume/share_fs_volume.rs).
		return m.Destination != "/dev" && (!below(m.Destination, "/dev") || !existsAsOther(m.Destination))
	}
	if !below(m.Source, "/dev") {
		return true
	}
	info, err := os.Stat(m.Source)
	return err == nil && info.Mode().IsRegular()
}

func below(path, root string) bool {
	path = filepath.Clean(path)
	return path == root || strings.HasPrefix(path, root+"/")
}

// existsAsOther reports whether path exists and is not a regular file.
func existsAsOther(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.Mode().IsRegular()
}

func readOnly(m specs.Mount) bool { return slices.Contains(m.Options, "ro") }
