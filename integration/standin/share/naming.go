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

// passthrough is the level that the Rust way has between the share and
// everything in it.
const passthrough = "passthrough"

// sandboxMounts is the folder of the operator's sandbox_bind_mounts.
const sandboxMounts = "sandbox-mounts"

// volumeName is the name that a volume gets in the share: of the container and
// its destination in the Go way, of its source in the Rust way, where all
// containers of a sandbox that have the same source share one.
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

// travels says whether a mount of a container's specification is shared with
// the guest. All others stay in the specification as they are, and mean
// whatever they mean there: a source that only the host has fails in the guest.
func travels(w way.Way, m specs.Mount) bool {
	if m.Type != "bind" || m.Destination == "/dev/shm" || below(m.Source, "/proc") || below(m.Source, "/sys") {
		return false
	}
	if w == way.Rust {
		// The Rust shim looks at the destination, and looks for it on the host
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

// existsAsOther says whether path is there and no regular file.
func existsAsOther(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.Mode().IsRegular()
}

func readOnly(m specs.Mount) bool { return slices.Contains(m.Options, "ro") }
