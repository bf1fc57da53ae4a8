// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

// BenchmarkCommit measures what a signature adds to the end of a checkpoint, in a
// directory in memory, where syncing costs nothing.
func BenchmarkCommit(b *testing.B) {
	key, err := signing.Load(filepath.Join(b.TempDir(), "key.pem"))
	if err != nil {
		b.Fatal(err)
	}
	for name, k := range map[string]*signing.Key{"unsigned": nil, "signed": key} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				target, m, dir := uncommitted(b)
				b.StartTimer()
				if err := errors.Join(target.Commit(b.Context(), m, k), target.Abort()); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := os.RemoveAll(dir); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
	b.Run("verify", func(b *testing.B) {
		target, m, dir := uncommitted(b)
		defer os.RemoveAll(dir)
		if err := errors.Join(target.Commit(b.Context(), m, key), target.Abort()); err != nil {
			b.Fatal(err)
		}
		set, err := Open(filepath.Join(dir, "set"))
		if err != nil {
			b.Fatal(err)
		}
		defer set.Close()
		for b.Loop() {
			if err := set.Verify([]ed25519.PublicKey{key.Public()}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// uncommitted is an image set of 50 files, as a small container has.
func uncommitted(b *testing.B) (target *Target, m *Manifest, dir string) {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kata-checkpoint-bench-")
	if err != nil {
		b.Skip(err)
	}
	exchange := filepath.Join(dir, "exchange", "images")
	if err := errors.Join(os.MkdirAll(exchange, 0o700), os.Mkdir(filepath.Join(dir, "set"), 0o700)); err != nil {
		b.Fatal(err)
	}
	names := []string{"inventory.img"}
	for i := range 49 {
		names = append(names, fmt.Sprintf("core-%d.img", i+1))
	}
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(exchange, name), []byte("content"), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	if target, err = NewTarget(filepath.Join(dir, "set")); err != nil {
		b.Fatal(err)
	}
	files, err := collect(b.Context(), filepath.Dir(exchange), "images", target.Dir(), Limits{Files: 100, Bytes: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	return target, &Manifest{Files: files}, dir
}
