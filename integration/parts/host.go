package parts

import (
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// VhostDeviceVsock unpacks the vsock daemon, which the host's Debian does not have, and returns its path.
func (p *Parts) VhostDeviceVsock(ctx context.Context) (string, error) {
	const name, program = "vhost-device-vsock", "usr/bin/vhost-device-vsock"
	dir, err := p.once(ctx, "host", keyOf(suite, name), func(ctx context.Context, path string) error {
		debs, err := p.fetch(ctx, name)
		if err != nil {
			return err
		}
		t := tree{}
		for _, deb := range debs {
			// Its libraries are on every Debian.
			if deb.Name != name {
				continue
			}
			if err := t.unpack(ctx, deb.Path, func(p string) bool { return p == program }); err != nil {
				return err
			}
		}
		return t.writeDir(path)
	})
	return filepath.Join(dir, program), err
}

// writeDir writes the tree as files.
func (t tree) writeDir(dir string) error {
	for _, p := range t.paths() {
		n, to := t[p], filepath.Join(dir, p)
		var err error
		switch {
		case n.mode.IsDir():
			err = os.MkdirAll(to, n.mode.Perm())
		case n.mode&fs.ModeSymlink != 0:
			err = os.Symlink(n.link, to)
		default:
			err = os.WriteFile(to, n.data, n.mode.Perm())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// InstallHostPackages installs what a testbed needs of the machine, as far as it is missing.
func (p *Parts) InstallHostPackages(ctx context.Context) error {
	return run(ctx, p.root, filepath.Join(p.root, "packaging/bootstrap"), "test")
}

// CopyTree copies a directory's files, directories and links.
func CopyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			return os.MkdirAll(target, info.Mode().Perm())
		case d.Type()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		default:
			return CopyFile(path, target)
		}
	})
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
