// SPDX-License-Identifier: Apache-2.0

// Package signing has the keys by which a node knows image sets that it, or a
// node that it trusts, has made. The shim signs the manifest of an image set,
// which has the digests of all other files, and verifies it before a restore.
//
// The keys are Ed25519, in the forms that openssl reads and writes: PKCS #8 for
// the node's own, PKIX for those of others, both as PEM. A signature is the 64
// bytes of RFC 8032 over the file as it is.
package signing

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

// Types of PEM blocks.
const (
	privateType = "PRIVATE KEY"
	publicType  = "PUBLIC KEY"
)

// PublicSuffix ends the name of the file with the public key, beside that with
// the private one.
const PublicSuffix = ".pub"

// Key is a node's own key.
type Key struct{ private ed25519.PrivateKey }

// Sign signs a message.
func (k *Key) Sign(message []byte) []byte { return ed25519.Sign(k.private, message) }

// Public is the public key.
func (k *Key) Public() ed25519.PublicKey {
	return k.private.Public().(ed25519.PublicKey) //nolint:forcetypeassert // documented
}

// Verify reports whether one of the keys has signed a message.
func Verify(keys []ed25519.PublicKey, message, signature []byte) bool {
	for _, k := range keys {
		if ed25519.Verify(k, message, signature) {
			return true
		}
	}
	return false
}

// Fingerprint identifies a public key to a reader: the SHA-256 of its PKIX form,
// in base64.
func Fingerprint(key ed25519.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "" // never of this type
	}
	sum := sha256.Sum256(der)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// ParsePublic reads the public keys in a text: one PEM block or more.
func ParsePublic(text string) (keys []ed25519.PublicKey, err error) {
	rest := []byte(text)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != publicType {
			return nil, fmt.Errorf("a PEM block of the type %q, not %q", block.Type, publicType)
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		public, ok := key.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("a key of the type %T, not Ed25519", key)
		}
		keys = append(keys, public)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no PEM block of the type %q", publicType)
	}
	return keys, nil
}

// Load reads the private key at path. If there is none, it makes one, and the
// file with the public key beside it. Of several that do so at the same time, all
// get the same key.
func Load(path string) (*Key, error) {
	k, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeKey(path); err == nil {
			k, err = read(path)
		}
	}
	if err == nil {
		err = writePublic(path+PublicSuffix, k.Public())
	}
	if err != nil {
		return nil, errcode.SigningKey.Errorf("key of this node for image sets: %w", err)
	}
	return k, nil
}

// maxKey bounds what is read of a key's file, in bytes.
const maxKey = 64 << 10

func read(path string) (*Key, error) {
	f, st, err := regular.Open(unix.AT_FDCWD, path, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return nil, errcode.SigningKey.Errorf("%s must belong to root and be readable by nobody else: make it so (chown root, chmod 600), or replace the key if others may have read it", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKey))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != privateType {
		return nil, errcode.SigningKey.Errorf("%s has no PEM block of the type %q: restore it from a backup, or remove it to have another key made", path, privateType)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, errcode.SigningKey.Errorf("%s has a key of the type %T, not Ed25519: make one with openssl genpkey -algorithm ed25519", path, key)
	}
	return &Key{private}, nil
}

// makeKey makes a key, unless somebody else does.
func makeKey(path string) error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return place(path, pem.EncodeToMemory(&pem.Block{Type: privateType, Bytes: der}), 0o600)
}

func writePublic(path string, key ed25519.PublicKey) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, err := MarshalPublic(key)
	if err != nil {
		return err
	}
	return place(path, text, 0o644)
}

// place makes a file, complete and on the disk before it has its name. One that
// has the name stays.
func place(path string, content []byte, mode fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(content)
	if err := errclass.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errclass.Join(d.Sync(), d.Close())
}
