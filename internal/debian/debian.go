// SPDX-License-Identifier: Apache-2.0

// Package debian downloads packages from a Debian suite other than the
// machine's, and unpacks them into a directory without installing anything. The
// guest bundle's CRIU and the testbed's guest come from such a suite: those of
// Debian 12 are too old.
//
// It is built on private-apt, a script beside this file, which also fetches a
// Go toolchain for machines without one.
package debian

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed private-apt
var privateApt string

// Request is what Fetch downloads.
type Request struct {
	// Suite is the suite's code name; all packages of a directory are of one
	// suite.
	Suite string
	// Packages are the names of the packages, without their dependencies.
	Packages []string
	// Dir is for apt's lists and the archives, a cache between calls.
	Dir string
}

// Package is a downloaded package.
type Package struct {
	Name    string
	Version string
	// Path is the .deb file.
	Path string
}

// Fetch downloads packages with their dependencies, and returns them in the
// order in which dpkg would unpack them. It needs network access to the
// machine's own Debian mirror, unless everything is cached and fresh.
func Fetch(ctx context.Context, request Request) ([]Package, error) {
	args := append([]string{"-c", privateApt, "private-apt", request.Dir, request.Suite, "download"}, request.Packages...)
	out, err := output(exec.CommandContext(ctx, "bash", args...))
	if err != nil {
		return nil, fmt.Errorf("fetch %s from Debian %s: %w", strings.Join(request.Packages, ", "), request.Suite, err)
	}
	var packages []Package
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		p, err := parsePath(lines.Text())
		if err != nil {
			return nil, err
		}
		packages = append(packages, p)
	}
	return packages, nil
}

// Unpack writes the package's files below dir. Where dir has a symbolic link
// to a directory (as /lib of a merged /usr), files go through it.
func (p Package) Unpack(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	unpack := exec.CommandContext(ctx, "bash", "-c", `set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"`, "unpack", p.Path, dir)
	if _, err := output(unpack); err != nil {
		return fmt.Errorf("unpack %s: %w", p.Name, err)
	}
	return nil
}

// Files lists the files of the package, relative to a root directory.
func (p Package) Files(ctx context.Context) ([]string, error) {
	out, err := output(exec.CommandContext(ctx, "bash", "-c", `set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -t`, "list", p.Path))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", p.Name, err)
	}
	var files []string
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		files = append(files, filepath.Clean(lines.Text()))
	}
	return files, nil
}

// parsePath parses a package's name and version from the name of an archive,
// NAME_VERSION_ARCHITECTURE.deb, in which apt writes a colon as %3a.
func parsePath(path string) (Package, error) {
	fields := strings.Split(strings.TrimSuffix(filepath.Base(path), ".deb"), "_")
	if len(fields) != 3 {
		return Package{}, fmt.Errorf("%q is not the name of a Debian archive", path)
	}
	return Package{Name: fields[0], Version: strings.ReplaceAll(fields[1], "%3a", ":"), Path: path}, nil
}

// output runs a command. The error includes its stderr.
func output(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}
