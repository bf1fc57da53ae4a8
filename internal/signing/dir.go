// SPDX-License-Identifier: Apache-2.0

package signing

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

// Trusted is a public key in a directory of trusted keys.
type Trusted struct {
	Key ed25519.PublicKey
	// File is the path of the file that it is in.
	File string
}

// ReadDir reads the public keys in the files of a directory whose names end
// with [PublicSuffix]. There may be no such directory.
func ReadDir(dir string) (keys []Trusted, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), PublicSuffix) || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		data, err := readOwn(path)
		if err != nil {
			return nil, err
		}
		found, err := ParsePublic(string(data))
		if err != nil {
			return nil, fmt.Errorf("%s has %w: remove it, or put an Ed25519 public key into it", path, err)
		}
		for _, k := range found {
			keys = append(keys, Trusted{k, path})
		}
	}
	return keys, nil
}

// readOwn reads a file that only root can write to.
func readOwn(path string) ([]byte, error) {
	f, st, err := regular.Open(unix.AT_FDCWD, path, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return nil, fmt.Errorf("%s must belong to root and be writable by nobody else (chown root, chmod go-w), once you have checked what is in it", path)
	}
	return io.ReadAll(io.LimitReader(f, maxKey))
}

// AddToDir puts a public key into a directory of trusted keys, which it makes.
// It returns the file's path.
func AddToDir(dir string, key ed25519.PublicKey) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	name := strings.NewReplacer("/", "_", "+", "-").Replace(strings.TrimPrefix(Fingerprint(key), "SHA256:"))
	path := filepath.Join(dir, name+PublicSuffix)
	text, err := MarshalPublic(key)
	if err != nil {
		return "", err
	}
	return path, place(path, text, 0o644)
}

// MarshalPublic returns a public key as PEM.
func MarshalPublic(key ed25519.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: publicType, Bytes: der}), nil
}
