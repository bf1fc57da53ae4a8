// SPDX-License-Identifier: Apache-2.0

package signing

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestKeyIsMadeOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "key.pem")
	keys := make([]*Key, 8)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			var err error
			if keys[i], err = Load(path); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	signature := keys[0].Sign([]byte("message"))
	for _, k := range keys {
		if !Verify([]ed25519.PublicKey{k.Public()}, []byte("message"), signature) {
			t.Error("two callers have two keys")
		}
	}
	if Verify([]ed25519.PublicKey{keys[0].Public()}, []byte("another"), signature) || Verify(nil, []byte("message"), signature) {
		t.Error("verified what is not signed, or by nobody")
	}
	public, err := os.ReadFile(path + PublicSuffix)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ParsePublic(string(public))
	if err != nil || len(parsed) != 1 || !parsed[0].Equal(keys[0].Public()) {
		t.Errorf("the public key is %v (%v)", parsed, err)
	}
	for name, mode := range map[string]os.FileMode{path: 0o600, path + PublicSuffix: 0o644} {
		if st, err := os.Stat(name); err != nil || st.Mode() != mode {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 2 {
		t.Errorf("there is %v (%v)", left, err)
	}
}

// An operator distributes keys, and checks signatures, with openssl.
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("there is no openssl")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "key.pem")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(openssl, args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	run("genpkey", "-algorithm", "ed25519", "-out", path)
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	message, signature := filepath.Join(dir, "message"), filepath.Join(dir, "message.sig")
	if err := errors.Join(os.WriteFile(message, []byte("message"), 0o600), os.WriteFile(signature, k.Sign([]byte("message")), 0o600)); err != nil {
		t.Fatal(err)
	}
	run("pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", path+PublicSuffix, "-in", message, "-sigfile", signature)
}

func TestKeysThatAreRefused(t *testing.T) {
	good := filepath.Join(t.TempDir(), "key.pem")
	if _, err := Load(good); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		lay func(path string) error
		err string
	}{
		"one that others read": {func(p string) error { return errors.Join(os.WriteFile(p, data, 0o600), os.Chmod(p, 0o640)) }, "readable by nobody else"},
		"an empty file":        {func(p string) error { return os.WriteFile(p, nil, 0o600) }, "no PEM block"},
		"half a key":           {func(p string) error { return os.WriteFile(p, data[:len(data)/2], 0o600) }, "no PEM block"},
		"another algorithm": {func(p string) error {
			return os.WriteFile(p, pem.EncodeToMemory(&pem.Block{Type: privateType, Bytes: der}), 0o600)
		}, "not Ed25519"},
		"a link": {func(p string) error { return os.Symlink(good, p) }, "not a regular file"},
	} {
		path := filepath.Join(t.TempDir(), "key.pem")
		if err := tc.lay(path); err != nil {
			t.Fatal(err)
		}
		before, _ := os.ReadFile(path)
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: error %v", name, err)
		}
		if after, _ := os.ReadFile(path); string(after) != string(before) {
			t.Errorf("%s was replaced", name)
		}
	}
}

func TestParsePublic(t *testing.T) {
	k, err := Load(filepath.Join(t.TempDir(), "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := string(pem.EncodeToMemory(&pem.Block{Type: publicType, Bytes: der}))
	private := string(pem.EncodeToMemory(&pem.Block{Type: privateType, Bytes: der}))
	for name, tc := range map[string]struct {
		text string
		keys int
	}{
		"one": {public, 1}, "two, with words": {"node a\n" + public + "node b\n" + public, 2},
		"none": {"ssh-ed25519 AAAA", 0}, "empty": {"", 0}, "a private one": {public + private, 0},
	} {
		keys, err := ParsePublic(tc.text)
		if len(keys) != tc.keys || (err == nil) != (tc.keys > 0) {
			t.Errorf("%s: %d keys, %v", name, len(keys), err)
		}
	}
	if f := Fingerprint(k.Public()); !strings.HasPrefix(f, "SHA256:") || len(f) != 50 {
		t.Errorf("fingerprint %q", f)
	}
}
