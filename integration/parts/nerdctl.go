package parts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Nerdctl builds nerdctl, of the version that its module below integration/deps pins, and returns its path.
func (p *Parts) Nerdctl(ctx context.Context) (string, error) {
	source := filepath.Join(p.root, "integration/deps/nerdctl")
	sum, err := fileKey(filepath.Join(source, "go.sum"))
	if err != nil {
		return "", fmt.Errorf("nerdctl: %w", err)
	}
	mod, err := fileKey(filepath.Join(source, "go.mod"))
	if err != nil {
		return "", fmt.Errorf("nerdctl: %w", err)
	}
	return p.once(ctx, "nerdctl", keyOf(sum, mod), func(ctx context.Context, path string) error {
		env := append(os.Environ(), "CGO_ENABLED=0")
		return runWith(ctx, env, source, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "github.com/containerd/nerdctl/v2/cmd/nerdctl")
	})
}
