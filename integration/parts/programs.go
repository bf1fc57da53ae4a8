// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Crictl builds crictl and returns its path.
func (p *Parts) Crictl(ctx context.Context) (string, error) {
	return p.program(ctx, "crictl", "sigs.k8s.io/cri-tools/cmd/crictl")
}

// Checkpointctl builds checkpointctl, which shows checkpoint archives, and
// returns its path.
func (p *Parts) Checkpointctl(ctx context.Context) (string, error) {
	return p.program(ctx, "checkpointctl", "github.com/checkpoint-restore/checkpointctl")
}

// Nerdctl builds nerdctl and returns its path.
func (p *Parts) Nerdctl(ctx context.Context) (string, error) {
	return p.program(ctx, "nerdctl", "github.com/containerd/nerdctl/v2/cmd/nerdctl")
}

// Helm builds helm and returns its path.
func (p *Parts) Helm(ctx context.Context) (string, error) {
	return p.program(ctx, "helm", "helm.sh/helm/v3/cmd/helm")
}

// Kubelet builds the kubelet and returns its path. That takes ten minutes on
// two cores; see [Parts.HaveKubelet].
func (p *Parts) Kubelet(ctx context.Context) (string, error) {
	return p.program(ctx, "kubelet", "k8s.io/kubernetes/cmd/kubelet")
}

// HaveKubelet reports whether the kubelet was built before.
func (p *Parts) HaveKubelet() bool {
	_, err := os.Stat(p.Build("programs/kubelet"))
	return err == nil
}

// Docker builds docker and dockerd and returns their paths. That takes five
// minutes on two cores; see [Parts.HaveDocker].
func (p *Parts) Docker(ctx context.Context) (client, daemon string, err error) {
	// Without a go.mod of its own it would be compiled as Go 1.16.
	client, err = p.program(ctx, "docker", "github.com/docker/cli/cmd/docker", "-gcflags=github.com/docker/cli/...=-lang=go1.25")
	if err != nil {
		return "", "", err
	}
	daemon, err = p.program(ctx, "dockerd", "github.com/moby/moby/v2/cmd/dockerd")
	return client, daemon, err
}

// HaveDocker reports whether docker was built before.
func (p *Parts) HaveDocker() bool {
	_, err := os.Stat(p.Build("programs/dockerd"))
	return err == nil
}

// program builds a program whose version is pinned by a module below
// integration/deps.
func (p *Parts) program(ctx context.Context, name, pkg string, flags ...string) (string, error) {
	source := filepath.Join(p.root, "integration/deps", name)
	var keys []string
	for _, file := range []string{"go.mod", "go.sum"} {
		key, err := fileKey(filepath.Join(source, file))
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		keys = append(keys, key)
	}
	return p.once(ctx, "programs/"+name, keyOf(append(append(keys, pkg), flags...)...), func(ctx context.Context, path string) error {
		// `make build` has built the standard library without cgo.
		args := append([]string{"build", "-trimpath", "-ldflags=-s -w"}, flags...)
		return runWith(ctx, append(os.Environ(), "CGO_ENABLED=0"), source, "go", append(args, "-o", path, pkg)...)
	})
}
