// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// NRIRuntime builds nri-runtime with the NRI version of a containerd release,
// as pinned by that release's module, and returns its path.
func (p *Parts) NRIRuntime(ctx context.Context, containerd string) (string, error) {
	module := filepath.Join(p.root, "integration/deps/containerd-"+containerd)
	source := filepath.Join(p.root, "integration/deps/nri-runtime/main.go")
	var sums []string
	for _, path := range []string{filepath.Join(module, "go.sum"), filepath.Join(module, "go.mod"), source} {
		sum, err := fileKey(path)
		if err != nil {
			return "", fmt.Errorf("nri-runtime: %w", err)
		}
		sums = append(sums, sum)
	}
	return p.once(ctx, "nri/"+containerd, keyOf(sums...), func(ctx context.Context, path string) error {
		return runWith(ctx, append(os.Environ(), "CGO_ENABLED=0"), module, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, source)
	})
}
