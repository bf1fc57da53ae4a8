// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The names of the images.
const (
	ImageName         = "docker.io/library/busybox:latest"
	WorkloadImageName = "docker.io/library/workload:latest"
	PauseImageName    = "docker.io/library/pause:latest"
)

// Image makes the container image, an OCI layout in a tar file, from Debian's
// static busybox: no registry is needed.
func (p *Parts) Image(ctx context.Context) (string, error) {
	return p.image(ctx, "busybox", ImageName, nil, []string{"image"}, "sh")
}

// PauseImage makes the image of a pod's sandbox container, which waits until it
// is killed.
func (p *Parts) PauseImage(ctx context.Context) (string, error) {
	return p.image(ctx, "pause", PauseImageName, nil, []string{"pause"}, "tail", "-f", "/dev/null")
}

// WorkloadImage makes an image that has a program at a path, in addition to
// what the busybox image has.
func (p *Parts) WorkloadImage(ctx context.Context, program, at string) (string, error) {
	return p.image(ctx, "workload", WorkloadImageName, []string{program}, []string{"image", program, at}, "sh")
}

// image makes the image file from inputs: its root file system is what the
// script root packs for args. command is the default of its containers.
func (p *Parts) image(ctx context.Context, file, name string, inputs, args []string, command ...string) (string, error) {
	keys := append([]string{rootScript}, args...)
	for _, input := range append(inputs, busyboxPath) {
		key, err := fileKey(input)
		if err != nil {
			return "", fmt.Errorf("%s image: %w", file, err)
		}
		keys = append(keys, key)
	}
	return p.once(ctx, "image/"+file+".tar", keyOf(keys...), func(ctx context.Context, path string) error {
		return packImage(ctx, path, name, args, command...)
	})
}

// packImage makes the image file from what the script root packs for args.
func packImage(ctx context.Context, path, name string, args []string, command ...string) error {
	layer := path + ".layer"
	defer os.Remove(layer)
	if err := pack(ctx, layer, args...); err != nil {
		return err
	}
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := writeImage(out, name, layer, nil, command...); err != nil {
		return err
	}
	return out.Close()
}

// checkpointAnnotation marks images of checkpoint archives; its value is the
// container's name (checkpointctl, lib/annotations.go).
const checkpointAnnotation = "org.criu.checkpoint.container.name"

// WriteCheckpointImage writes an OCI image of a checkpoint archive, from which
// the CRI of containerd up to 2.3 restores containers.
func WriteCheckpointImage(w io.Writer, name, container, archive string) error {
	return writeImage(w, name, archive, map[string]string{checkpointAnnotation: container})
}

// writeImage writes an OCI layout with one layer, a tar file.
func writeImage(w io.Writer, name, layer string, annotations map[string]string, command ...string) error {
	data, err := os.ReadFile(layer)
	if err != nil {
		return err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.AppendLayers(image, static.NewLayer(data, types.OCIUncompressedLayer)); err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	config.OS, config.Architecture = "linux", "amd64"
	config.Config = v1.Config{Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: command}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return err
	}
	image = mutate.Annotations(image, annotations).(v1.Image)

	dir, err := os.MkdirTemp("", "image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	index, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	if err := index.AppendImage(image, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          name,
		"org.opencontainers.image.ref.name": "latest",
	})); err != nil {
		return err
	}
	out := tar.NewWriter(w)
	if err := out.AddFS(os.DirFS(dir)); err != nil {
		return err
	}
	return out.Close()
}
