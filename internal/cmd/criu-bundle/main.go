// SPDX-License-Identifier: Apache-2.0

// Command criu-bundle builds the part of the guest bundle that consists of
// Debian packages: CRIU, the two programs that it starts, tar and gzip, and the
// libraries of all three, in a directory that works in any guest, whatever its
// C library. It adds the licences and a list of the packages.
//
//	criu-bundle -cache DIR -out DIR
//
// It needs Debian's patchelf and a Debian mirror, and leaves either a complete
// bundle at -out or none.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

const (
	// suite is the oldest Debian suite with a CRIU that is recent enough (4.2).
	suite = "forky"
	// guestHome is where the guest agent copies the bundle's criu directory
	// (guestagent/internal/criu, Load). The path of an ELF interpreter has to be
	// absolute; the libraries are found relative to the programs.
	guestHome = api.StateDir + "/criu"
)

// programs are the programs of the bundle and the packages that they are in.
var programs = map[string]string{
	"usr/sbin/criu": "criu",
	"usr/bin/tar":   "tar",
	"usr/bin/gzip":  "gzip",
}

// licenceTexts is the package with the licences that copyright files refer to.
const licenceTexts = "base-files"

func main() {
	cache := flag.String("cache", "", "directory for apt's lists and downloaded packages")
	out := flag.String("out", "", "output directory; replaced if it exists")
	flag.Parse()
	if *cache == "" || *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := build(ctx, *cache, *out); err != nil {
		fmt.Fprintln(os.Stderr, "criu-bundle:", err)
		os.Exit(1)
	}
}

// build writes the bundle beside out and moves it there when it is complete.
func build(ctx context.Context, cache, out string) (err error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(filepath.Dir(out), ".criu-bundle-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)

	packages, err := fetch(ctx, cache)
	if err != nil {
		return err
	}
	source := &tree{dir: filepath.Join(work, "packages"), owner: map[string]debian.Package{}}
	for _, p := range packages {
		if err := source.add(ctx, p); err != nil {
			return err
		}
	}
	staged := filepath.Join(work, "bundle")
	used, err := copyPrograms(ctx, source, filepath.Join(staged, "criu"))
	if err != nil {
		return err
	}
	if err := describe(source, used, staged); err != nil {
		return err
	}
	if err := os.RemoveAll(out); err != nil {
		return err
	}
	return os.Rename(staged, out)
}

func fetch(ctx context.Context, cache string) ([]debian.Package, error) {
	names := []string{licenceTexts}
	for _, name := range programs {
		names = append(names, name)
	}
	return debian.Fetch(ctx, debian.Request{Suite: suite, Packages: names, Dir: cache})
}
