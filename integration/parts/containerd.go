// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// ContainerdVersion is the default release of testbeds. Like each of
// [OlderContainerds] it has a module below integration/deps that pins its
// newest patch.
const ContainerdVersion = "2.4"

// OlderContainerds are the other supported releases, and [OldestContainerd].
var OlderContainerds = []string{"2.1", "2.2", "2.3", OldestContainerd}

// OldestContainerd is the oldest patch that is supported. Its CRI requires more
// of a checkpoint than that of later ones.
const OldestContainerd = "2.1.0"

// withCRI are the releases that are built with the CRI, because scenarios use
// it; building it takes long.
var withCRI = []string{ContainerdVersion, "2.3", OldestContainerd}

// Containerd builds a release of containerd and ctr and returns their
// directory.
func (p *Parts) Containerd(ctx context.Context, version string) (string, error) {
	source := filepath.Join(p.root, "integration/deps/containerd-"+version)
	sum, err := fileKey(filepath.Join(source, "go.sum"))
	if err != nil {
		return "", fmt.Errorf("containerd: %w", err)
	}
	mod, err := fileKey(filepath.Join(source, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("containerd: %w", err)
	}
	args, env := []string{"build", "-trimpath"}, os.Environ()
	if version != ContainerdVersion {
		// Only what the scenarios of older releases need: building takes long.
		// `make build` has built the standard library without cgo.
		tags := "-tags=no_btrfs,no_devmapper,no_zfs,no_aufs"
		if !slices.Contains(withCRI, version) {
			tags += ",no_cri"
		}
		args = append(args, "-ldflags=-s -w", tags)
		env = append(env, "CGO_ENABLED=0")
	}
	return p.once(ctx, "containerd/"+version+"/bin", keyOf(append([]string{sum, mod}, args[2:]...)...), func(ctx context.Context, path string) error {
		const cmd = "github.com/containerd/containerd/v2/cmd/"
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		return runWith(ctx, env, source, "go", append(args, "-o", path+"/", cmd+"containerd", cmd+"ctr")...)
	})
}
