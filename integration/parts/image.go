package parts

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImageName is what the image made by [Parts.Image] is called.
const ImageName = "docker.io/library/busybox:latest"

// WorkloadImageName is what the image made by [Parts.WorkloadImage] is called.
const WorkloadImageName = "docker.io/library/workload:latest"

// Image makes the container image, an OCI layout in a tar file, from Debian's static busybox: no registry is needed.
func (p *Parts) Image(ctx context.Context) (string, error) {
	busybox, err := fileKey(busyboxPath)
	if err != nil {
		return "", fmt.Errorf("image: %w", err)
	}
	const format = "1" // to be raised with every change below
	return p.once(ctx, "image/busybox.tar", keyOf(format, busybox), func(ctx context.Context, path string) error {
		t, err := imageRoot(ctx)
		if err != nil {
			return err
		}
		return writeFile(path, func(w io.Writer) error { return writeImage(w, ImageName, t, "sh") })
	})
}

// PauseImageName is what the image made by [Parts.PauseImage] is called.
const PauseImageName = "docker.io/library/pause:latest"

// PauseImage makes the image of the container that holds a pod: it waits until it is killed.
func (p *Parts) PauseImage(ctx context.Context) (string, error) {
	busybox, err := fileKey(busyboxPath)
	if err != nil {
		return "", fmt.Errorf("pause image: %w", err)
	}
	const format = "1" // to be raised with every change below
	return p.once(ctx, "image/pause.tar", keyOf(format, busybox), func(ctx context.Context, path string) error {
		t := tree{}
		t.dir(0o755, "bin", "dev", "etc", "proc", "sys")
		if err := t.addBusybox(ctx, "bin"); err != nil {
			return err
		}
		return writeFile(path, func(w io.Writer) error { return writeImage(w, PauseImageName, t, "tail", "-f", "/dev/null") })
	})
}

// WorkloadImage makes an image that has the program in it at a path, beside all that the busybox image has.
func (p *Parts) WorkloadImage(ctx context.Context, program, at string) (string, error) {
	busybox, err := fileKey(busyboxPath)
	if err != nil {
		return "", fmt.Errorf("workload image: %w", err)
	}
	workload, err := fileKey(program)
	if err != nil {
		return "", fmt.Errorf("workload image (make build): %w", err)
	}
	const format = "1" // to be raised with every change below
	return p.once(ctx, "image/workload.tar", keyOf(format, busybox, workload, at), func(ctx context.Context, path string) error {
		t, err := imageRoot(ctx)
		if err != nil {
			return err
		}
		if err := t.copyFile(at, program); err != nil {
			return err
		}
		return writeFile(path, func(w io.Writer) error { return writeImage(w, WorkloadImageName, t, "sh") })
	})
}

func imageRoot(ctx context.Context) (tree, error) {
	t := tree{}
	t.dir(0o755, "bin", "dev", "etc", "home", "proc", "run", "sys", "usr/bin", "usr/sbin", "var/log", "var/tmp")
	t.dir(0o700, "root")
	t.dir(0o777|os.ModeSticky, "tmp")
	t.add("home/user", node{mode: os.ModeDir | 0o755, uid: 1000, gid: 1000})
	t.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	t.file("etc/group", 0o644, []byte("root:x:0:\nuser:x:1000:\nextra:x:2000:user\nnogroup:x:65534:\n"))
	t.symlink("var/run", "../run")
	return t, t.addBusybox(ctx, "bin")
}

// writeImage writes an OCI layout with one layer. command is what a container runs that is told nothing else.
func writeImage(w io.Writer, name string, root tree, command ...string) error {
	var layer bytes.Buffer
	if err := root.writeTar(&layer); err != nil {
		return err
	}
	return writeLayout(w, name, layer.Bytes(), nil, command...)
}

// checkpointAnnotation marks images of checkpoint archives; its value is the container's name (checkpointctl, lib/annotations.go).
const checkpointAnnotation = "org.criu.checkpoint.container.name"

// WriteCheckpointImage writes an OCI image of a checkpoint archive, as containerd's CRI restores containers from up to 2.3.
func WriteCheckpointImage(w io.Writer, name, container, archive string) error {
	layer, err := os.ReadFile(archive)
	if err != nil {
		return err
	}
	return writeLayout(w, name, layer, map[string]string{checkpointAnnotation: container})
}

// writeLayout writes an OCI layout with a layer.
func writeLayout(w io.Writer, name string, layer []byte, annotations map[string]string, command ...string) error {
	out := tar.NewWriter(w)
	write := func(name string, data []byte) error {
		if err := out.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}); err != nil {
			return err
		}
		_, err := out.Write(data)
		return err
	}
	blob := func(mediaType string, data []byte) (ocispec.Descriptor, error) {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		return d, write("blobs/sha256/"+d.Digest.Encoded(), data)
	}
	blobJSON := func(mediaType string, v any) (ocispec.Descriptor, error) {
		data, err := json.Marshal(v)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return blob(mediaType, data)
	}
	layerBlob, err := blob(ocispec.MediaTypeImageLayer, layer)
	if err != nil {
		return err
	}
	config, err := blobJSON(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{Architecture: "amd64", OS: "linux"},
		Config:   ocispec.ImageConfig{Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: command},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layerBlob.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := blobJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{layerBlob}, Annotations: annotations,
	})
	if err != nil {
		return err
	}
	manifest.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: "latest"}
	for file, v := range map[string]any{
		ocispec.ImageIndexFile:  ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{manifest}},
		ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion},
	} {
		data, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := write(file, data); err != nil {
			return err
		}
	}
	return out.Close()
}
