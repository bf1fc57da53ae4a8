// Package debian takes packages from a Debian suite that the machine does not
// run, and unpacks them into a directory without installing anything. The
// guest bundle's CRIU and the testbed's guest come from such a suite: the one
// that Debian 12 has does not suffice.
//
// The work is done by private-apt, a script beside this file, which is also
// what fetches a Go toolchain for a machine that has none.
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

// Request names what Fetch has to download.
type Request struct {
	// Suite is the suite's code name; all packages of a directory are of one
	// suite.
	Suite string
	// Packages are the names of the packages; what they depend on comes along.
	Packages []string
	// Dir holds apt's lists and the archives. It serves as a cache between calls.
	Dir string
}

// Package is a downloaded package.
type Package struct {
	Name    string
	Version string
	// Path is the .deb file.
	Path string
}

// Fetch downloads packages and all that they depend on, in the order in which
// dpkg would unpack them. Needs network access to the machine's own Debian
// mirror unless everything is in the request's directory already and fresh.
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

// Files lists what the package holds, as paths relative to a root directory.
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

// parsePath takes a package's name and version from an archive's file name,
// NAME_VERSION_ARCHITECTURE.deb, in which apt writes a colon as %3a.
func parsePath(path string) (Package, error) {
	fields := strings.Split(strings.TrimSuffix(filepath.Base(path), ".deb"), "_")
	if len(fields) != 3 {
		return Package{}, fmt.Errorf("%q is no Debian archive's name", path)
	}
	return Package{Name: fields[0], Version: strings.ReplaceAll(fields[1], "%3a", ":"), Path: path}, nil
}

// output runs a command; its error is what the command said on stderr.
func output(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}
