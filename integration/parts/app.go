// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

// appSuite is the Debian release of the applications: a stable one, in which
// only their patch levels change.
const appSuite = "trixie"

// appFiles has a directory for each application. Its files are in /app of the
// image; setup is run in the image's root when that is made, as root, in place
// of the packages' scripts.
//
//go:embed apps
var appFiles embed.FS

// App is an application from Debian's packages.
type App struct {
	// Name is that of its directory.
	Name string
	// Packages are unpacked with their dependencies; there may be none.
	Packages []string
	// Without are the packages that are left out, each with all those whose
	// names begin with it: nothing in the image uses them.
	Without []string
	// Program is the name of a program that `make build` makes, in place of the
	// directory's file run; or empty.
	Program string
}

// The applications.
var (
	// Without its compiler for expressions, and without what Debian's scripts
	// for several clusters on a machine need.
	PostgreSQL = App{
		Name:     "postgresql",
		Packages: []string{"postgresql-17", "bash"},
		Without:  []string{"libllvm", "libz3", "perl", "libperl", "locales", "postgresql-common", "postgresql-client-common"},
	}
	JVM = App{
		Name:     "jvm",
		Packages: []string{"openjdk-21-jre-headless"},
		Without:  []string{"ca-certificates", "openssl", "util-linux", "libpam", "libsystemd0", "libnss3", "libnspr4"},
	}
	Redis = App{Name: "redis", Packages: []string{"redis-server", "bash"}, Without: []string{"perl", "openssl-provider-legacy"}}
	Nginx = App{Name: "nginx", Packages: []string{"nginx", "bash"}, Without: []string{"perl", "openssl-provider-legacy", "iproute2"}}
	// multiprocessing and sqlite3 are in the standard library.
	Python = App{Name: "python", Packages: []string{"python3"}, Without: []string{"openssl-provider-legacy", "media-types", "tzdata"}}
	Node   = App{Name: "node", Packages: []string{"nodejs"}, Without: []string{"openssl-provider-legacy", "node-corepack"}}
	Go     = App{Name: "go", Program: "app-go"}
	// What makes sandboxes of namespaces and mounts, for desktop applications and
	// builders.
	Bubblewrap = App{Name: "bubblewrap", Packages: []string{"bubblewrap"}}
	// It watches its directories by inotify.
	DBus = App{Name: "dbus", Packages: []string{"dbus-daemon", "dbus-bin"}}
)

// ImageName is the name of the application's image.
func (a App) ImageName() string { return "docker.io/library/app-" + a.Name + ":latest" }

// AppImage makes the image of an application, with a user of id 1000 as in the
// other images. Its containers run /app/run.
func (p *Parts) AppImage(ctx context.Context, a App) (string, error) {
	files, err := fs.Sub(appFiles, "apps/"+a.Name)
	if err != nil {
		return "", fmt.Errorf("image of %s: %w", a.Name, err)
	}
	busybox, err := fileKey(busyboxPath)
	if err != nil {
		return "", fmt.Errorf("image of %s: %w", a.Name, err)
	}
	keys := []string{rootScript, busybox, appSuite, strings.Join(a.Packages, " "), strings.Join(a.Without, " ")}
	if err := fs.WalkDir(files, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(files, path)
		keys = append(keys, path, string(data))
		return err
	}); err != nil {
		return "", fmt.Errorf("image of %s: %w", a.Name, err)
	}
	if a.Program != "" {
		program, err := fileKey(p.Bin(a.Program))
		if err != nil {
			return "", fmt.Errorf("image of %s: %w", a.Name, err)
		}
		keys = append(keys, program)
	}
	return p.once(ctx, "image/app-"+a.Name+".tar", keyOf(keys...), func(ctx context.Context, path string) error {
		var debs []debian.Package
		if len(a.Packages) > 0 {
			var err error
			if debs, err = debian.Fetch(ctx, debian.Request{Suite: appSuite, Packages: a.Packages, Dir: p.Build("apt", appSuite)}); err != nil {
				return err
			}
		}
		dir, err := os.MkdirTemp("", "app-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		if err := os.CopyFS(dir, files); err != nil {
			return err
		}
		if a.Program != "" {
			if err := CopyFile(p.Bin(a.Program), filepath.Join(dir, "run")); err != nil {
				return err
			}
		}
		args := []string{"app", dir}
		for _, deb := range debs {
			if !slices.ContainsFunc(a.Without, func(prefix string) bool { return strings.HasPrefix(deb.Name, prefix) }) {
				args = append(args, deb.Path)
			}
		}
		return packImage(ctx, path, a.ImageName(), args, "/app/run")
	})
}
