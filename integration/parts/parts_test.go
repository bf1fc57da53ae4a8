// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestImageIsWhatItsDigestsSay(t *testing.T) {
	tree := t.TempDir()
	if err := os.Mkdir(filepath.Join(tree, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "etc/empty"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root.tar")
	if out, err := exec.Command("tar", "-cf", root, "-C", tree, "etc").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	packed, err := os.ReadFile(root)
	if err != nil {
		t.Fatal(err)
	}
	var first, second bytes.Buffer
	if err := writeImage(&first, ImageName, root, nil); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(first.Bytes())); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	read := func(d ocispec.Descriptor, v any) []byte {
		t.Helper()
		data := files["blobs/sha256/"+d.Digest.Encoded()]
		if d.Digest.Algorithm().FromBytes(data) != d.Digest || int64(len(data)) != d.Size {
			t.Fatalf("blob %s is not what it is called", d.Digest)
		}
		if v != nil {
			if err := json.Unmarshal(data, v); err != nil {
				t.Fatal(err)
			}
		}
		return data
	}
	var index ocispec.Index
	if err := json.Unmarshal(files[ocispec.ImageIndexFile], &index); err != nil {
		t.Fatal(err)
	}
	if name := index.Manifests[0].Annotations["io.containerd.image.name"]; name != ImageName {
		t.Errorf("image name %q", name)
	}
	var manifest ocispec.Manifest
	read(index.Manifests[0], &manifest)
	var config ocispec.Image
	read(manifest.Config, &config)
	layer := read(manifest.Layers[0], nil)
	if got, want := config.RootFS.DiffIDs[0], manifest.Layers[0].Digest; got != want {
		t.Errorf("diff id %s of an uncompressed layer %s", got, want)
	}
	if !bytes.Equal(layer, packed) {
		t.Error("the layer is not the archive that it was made of")
	}
	if err := writeImage(&second, ImageName, root, nil); err != nil {
		t.Fatal(err)
	}
	if first.Len() != second.Len() {
		t.Error("a second image differs")
	}
}

func TestOnceMakesAgainOnlyForAnotherKey(t *testing.T) {
	p := &Parts{root: t.TempDir()}
	made := 0
	build := func(content string, fail error) func(context.Context, string) error {
		return func(_ context.Context, path string) error {
			made++
			if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
				return err
			}
			return fail
		}
	}
	get := func(key, content string, fail error, want string, wantMade int) {
		t.Helper()
		path, err := p.once(t.Context(), "dir/part", keyOf(key), build(content, fail))
		if !errors.Is(err, fail) {
			t.Fatalf("error %v, want %v", err, fail)
		}
		if data, _ := os.ReadFile(path); string(data) != want || made != wantMade {
			t.Errorf("%q after making %d times, want %q and %d", data, made, want, wantMade)
		}
	}
	get("one", "first", nil, "first", 1)
	get("one", "not made", nil, "first", 1)
	get("two", "second", nil, "second", 2)
	get("three", "broken", io.ErrUnexpectedEOF, "", 3)
	get("two", "again", nil, "again", 4)
	if left, _ := filepath.Glob(filepath.Join(p.root, "build/dir/*")); len(left) != 1 || !strings.HasSuffix(left[0], "/part") {
		t.Errorf("left: %v", left)
	}
}
