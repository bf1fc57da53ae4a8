package parts

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestLessVersionOrdersKernels(t *testing.T) {
	want := []string{"/boot/vmlinuz-5.10.0-8", "/boot/vmlinuz-6.1.0-9", "/boot/vmlinuz-6.1.0-56", "/boot/vmlinuz-6.1.0-56-b", "/boot/vmlinuz-6.10.0-1"}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, func(a, b string) int {
		switch {
		case lessVersion(a, b):
			return -1
		case lessVersion(b, a):
			return 1
		}
		return 0
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func sample() tree {
	t := tree{}
	t.dir(0o777|fs.ModeSticky, "tmp")
	t.file("usr/bin/busybox", 0o755, []byte("program"))
	t.symlink("usr/bin/sh", "busybox")
	t.symlink("bin", "usr/bin")
	t.file("etc/empty", 0o644, nil)
	return t
}

func TestCPIOIsReadByCPIO(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip(err)
	}
	var archive bytes.Buffer
	if err := sample().writeCPIO(&archive); err != nil {
		t.Fatal(err)
	}
	over := tree{}
	over.file("usr/bin/agent", 0o755, []byte("agent"))
	first := archive.Len()
	if err := over.writeCPIO(&archive); err != nil {
		t.Fatal(err)
	}
	if first%4 != 0 {
		t.Errorf("an archive of %d bytes: the kernel wants the next at a multiple of 4", first)
	}
	dir := t.TempDir()
	// cpio reads one archive; the kernel goes on behind its end.
	for _, a := range [][]byte{archive.Bytes()[:first], archive.Bytes()[first:]} {
		cmd := exec.Command("cpio", "-i", "--quiet")
		cmd.Dir, cmd.Stdin = dir, bytes.NewReader(a)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for path, want := range map[string]string{"bin/sh": "program", "etc/empty": "", "usr/bin/agent": "agent"} {
		if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", path, got, err, want)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "tmp")); err != nil || info.Mode() != fs.ModeDir|fs.ModeSticky|0o777 {
		t.Errorf("tmp: %v, %v", info.Mode(), err)
	}
}

func TestPackagesGoBelowUsr(t *testing.T) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir},
		{Name: "./lib64", Typeflag: tar.TypeSymlink, Linkname: "usr/lib64"}, // Debian's libc has it; followed, it would lead to itself
		{Name: "./bin/bash", Typeflag: tar.TypeReg, Mode: 0o755, Size: 4},
		{Name: "./usr/bin/rbash", Typeflag: tar.TypeLink, Linkname: "./bin/bash"},
		{Name: "./usr/share/doc/bash/README", Typeflag: tar.TypeReg, Size: 4},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, "data"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	got := tree{}
	if err := got.unpackTar(tar.NewReader(&archive), wanted); err != nil {
		t.Fatal(err)
	}
	want := []string{"usr", "usr/bin", "usr/bin/bash", "usr/bin/rbash"}
	if diff := cmp.Diff(want, got.paths()); diff != "" {
		t.Error(diff)
	}
	if string(got["usr/bin/rbash"].data) != "data" {
		t.Error("a hard link lost its content")
	}
}

func TestImageIsWhatItsDigestsSay(t *testing.T) {
	var first, second bytes.Buffer
	if err := writeImage(&first, ImageName, sample()); err != nil {
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
	var names []string
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	if want := []string{"bin", "etc/", "etc/empty", "tmp/", "usr/", "usr/bin/", "usr/bin/busybox", "usr/bin/sh"}; !slices.Equal(names, want) {
		t.Errorf("layer %q, want %q", names, want)
	}
	if err := writeImage(&second, ImageName, sample()); err != nil {
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
