// SPDX-License-Identifier: Apache-2.0

// Package parts builds what a testbed is assembled from and caches it in the
// checkout's build directory: containerd, the guest's initrd, the container
// images, the host's vsock daemon. Package testbed and its command are the
// callers.
//
// Each part has a key derived from its inputs and is rebuilt only when the key
// changes. Several processes may request a part at the same time: one of them
// builds it, the others wait.
package parts

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/log"
)

// Parts finds and builds the parts of one checkout.
type Parts struct {
	root string // the checkout
}

const module = "module github.com/kata-checkpoint/kata-checkpoint\n"

// Find looks for the checkout upwards from the working directory, then upwards
// from the running program.
func Find() (*Parts, error) {
	var starts []string
	if dir, err := os.Getwd(); err == nil {
		starts = append(starts, dir)
	}
	if exe, err := os.Executable(); err == nil {
		starts = append(starts, filepath.Dir(exe))
	}
	for _, dir := range starts {
		for ; dir != "/"; dir = filepath.Dir(dir) {
			if data, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && strings.Contains(string(data), module) {
				return &Parts{root: dir}, nil
			}
		}
	}
	return nil, errors.New("the checkout of kata-checkpoint is neither above the working directory nor above the program")
}

// Bin returns a path in the directory that `make build` writes programs to.
func (p *Parts) Bin(name ...string) string {
	return filepath.Join(append([]string{p.root, "bin"}, name...)...)
}

// Build returns a path in the directory of everything that can be rebuilt.
func (p *Parts) Build(name ...string) string {
	return filepath.Join(append([]string{p.root, "build"}, name...)...)
}

// once builds the part name (a path below build) unless it exists with the same
// key. build writes the part, a file or a directory, to a temporary path; it is
// renamed only on success.
func (p *Parts) once(ctx context.Context, name string, key []byte, build func(ctx context.Context, path string) error) (string, error) {
	path := p.Build(name)
	unlock, err := p.lock(name)
	if err != nil {
		return "", err
	}
	defer unlock()
	stamp := p.Build(".keys", strings.ReplaceAll(name, "/", "_"))
	want := hex.EncodeToString(key)
	if have, err := os.ReadFile(stamp); err == nil && string(have) == want {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	log.G(ctx).WithField("part", name).Info("building part")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	fresh := path + ".new"
	if err := errors.Join(os.Remove(stamp), os.RemoveAll(fresh)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	if err := build(ctx, fresh); err != nil {
		_ = os.RemoveAll(fresh)
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	if err := os.RemoveAll(path); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	if err := os.WriteFile(stamp, []byte(want), 0o644); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return path, nil
}

// lock keeps others from building the same part until the returned function is
// called.
func (p *Parts) lock(name string) (func(), error) {
	dir := p.Build(".keys")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, strings.ReplaceAll(name, "/", "_")+".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}

// keyOf derives a key from texts.
func keyOf(texts ...string) []byte {
	h := sha256.New()
	for _, t := range texts {
		fmt.Fprintf(h, "%d:%s", len(t), t)
	}
	return h.Sum(nil)
}

// fileKey derives a key from a file's content.
func fileKey(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
