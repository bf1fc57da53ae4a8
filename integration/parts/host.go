// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

// VhostDeviceVsock unpacks the vsock daemon, which the host's Debian lacks, and
// returns its path.
func (p *Parts) VhostDeviceVsock(ctx context.Context) (string, error) {
	const name, program = "vhost-device-vsock", "usr/bin/vhost-device-vsock"
	dir, err := p.once(ctx, "host", keyOf(suite, name), func(ctx context.Context, path string) error {
		debs, err := p.fetch(ctx, name)
		if err != nil {
			return err
		}
		// Every Debian has its libraries.
		i := slices.IndexFunc(debs, func(deb debian.Package) bool { return deb.Name == name })
		return debs[i].Unpack(ctx, path)
	})
	return filepath.Join(dir, program), err
}

// InstallHostPackages installs the packages that a testbed needs on the
// machine, unless they are there.
func (p *Parts) InstallHostPackages(ctx context.Context) error {
	return run(ctx, p.root, filepath.Join(p.root, "packaging/bootstrap"), "test")
}

// CopyFile copies a regular file with its permissions.
func CopyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Close()
}
