// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layer lists the files of the container's writable layer, as a commit of the
// container would have them.
func (e *Engine) Layer(ctx context.Context, container client.Container) ([]string, error) {
	names, err := e.layer(ctx, container)
	if err != nil {
		return nil, fmt.Errorf("writable layer of %s: %w", container.ID(), err)
	}
	return names, nil
}

func (e *Engine) layer(ctx context.Context, container client.Container) ([]string, error) {
	ctx, done, err := e.Client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	// A lease that is not deleted expires after a day.
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	info, err := container.Info(ctx)
	if err != nil {
		return nil, err
	}
	layer, err := rootfs.CreateDiff(ctx, info.SnapshotKey, e.Client.SnapshotService(info.Snapshotter), e.Client.DiffService(),
		diff.WithMediaType(ocispec.MediaTypeImageLayer))
	if err != nil {
		return nil, err
	}
	reader, err := e.Client.ContentStore().ReaderAt(ctx, layer)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	var names []string
	for in := tar.NewReader(content.NewReader(reader)); ; {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
		names = append(names, header.Name)
	}
}
