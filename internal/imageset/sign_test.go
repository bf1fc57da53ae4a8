// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

func newKey(t *testing.T) *signing.Key {
	t.Helper()
	k, err := signing.Load(filepath.Join(t.TempDir(), "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// signedSet commits an image set that a key signs.
func signedSet(t *testing.T, k *signing.Key) string {
	t.Helper()
	dir := filepath.Join(memory(t), "set")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	target, err := NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(target.Dir().Name(), InventoryName), "i")
	m := &Manifest{Files: []File{{Name: InventoryName, Size: 1, BLAKE3: digest("i")}}, Rights: &Rights{UID: 1000, Namespaces: []string{"pid"}}}
	if err := errors.Join(target.Commit(t.Context(), m, k), target.Abort()); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestSignature(t *testing.T) {
	own, other := newKey(t), newKey(t)
	both := []ed25519.PublicKey{other.Public(), own.Public()}
	for name, tc := range map[string]struct {
		change func(t *testing.T, dir string)
		keys   []ed25519.PublicKey
		want   error
	}{
		"as it was made":            {func(*testing.T, string) {}, both, nil},
		"by a node that is unknown": {func(*testing.T, string) {}, both[:1], ErrUntrusted},
		"by nobody that is known":   {func(*testing.T, string) {}, nil, ErrUntrusted},
		"without its signature":     {func(_ *testing.T, dir string) { os.Remove(filepath.Join(dir, SignatureName)) }, both, ErrUnsigned},
		"with an empty one":         {func(t *testing.T, dir string) { write(t, filepath.Join(dir, SignatureName), "") }, both, ErrForged},
		"of another manifest": {func(t *testing.T, dir string) {
			edit(t, dir, func(m map[string]any) { m["rights"].(map[string]any)["uid"] = 0 })
		}, both, ErrForged},
		"with another file": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, InventoryName), "x")
			edit(t, dir, func(m map[string]any) { file(m, 0)["blake3"] = digest("x") })
		}, both, ErrForged},
		"of the format before": {func(t *testing.T, dir string) {
			edit(t, dir, func(m map[string]any) { m["formatVersion"] = 1 })
			os.Remove(filepath.Join(dir, SignatureName))
		}, both, ErrUnsigned},
	} {
		t.Run(name, func(t *testing.T) {
			dir := signedSet(t, own)
			tc.change(t, dir)
			set, err := Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer set.Close()
			if err := set.Verify(tc.keys); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
}

// A signature is there before the manifest is, and a checkpoint in the same place
// replaces both.
func TestSignedSetIsReplaced(t *testing.T) {
	dir := signedSet(t, newKey(t))
	if got := names(t, dir); !slices.Equal(got, []string{InventoryName, ManifestName, SignatureName}) {
		t.Errorf("there is %q", got)
	}
	commit(t, dir, map[string]string{InventoryName: "next"})
	set, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if err := set.Verify(nil); !errors.Is(err, ErrUnsigned) {
		t.Errorf("error %v", err)
	}
}
