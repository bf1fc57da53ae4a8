// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

// rootScript packs root file systems: of guests and of images.
//
//go:embed root
var rootScript string

//go:embed init
var guestInit []byte

// suite is the Debian release of the guest's programs, the same as that of the
// guest bundle's CRIU.
const suite = "forky"

// Guest packages. Kata's agent needs the libraries, and a shell for its debug
// console that can be started without an argv[0], which busybox cannot. The
// stand-in's agent runs containers with runc.
var (
	agentPackages   = []string{"bash", "libseccomp2", "libgcc-s1"}
	standinPackages = []string{"bash", "runc"}
)

// guestKernelEnv names a guest kernel that the testbed boots in place of
// Debian's, with all that the guest needs built in.
const guestKernelEnv = "TESTBED_GUEST_KERNEL"

// Kernel returns the newest of the host's Debian cloud kernels: its image, or
// that of the kernel to be booted in its place, and its version, which is that
// of the modules in the guest.
func Kernel() (image, version string, err error) {
	out, err := exec.Command("bash", "-c", "ls -v /boot/vmlinuz-*-cloud-amd64 | tail -n 1").Output()
	image = strings.TrimSpace(string(out))
	if err != nil || image == "" {
		return "", "", errors.New("no cloud kernel in /boot: run make bootstrap")
	}
	version = strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
	return cmp.Or(os.Getenv(guestKernelEnv), image), version, nil
}

// OwnKernel reports whether the guest boots a kernel that `kata-checkpoint
// guest-kernel` has built.
func OwnKernel() bool { return os.Getenv(guestKernelEnv) != "" }

// StandinInitrd makes the initrd with the stand-in's agent, a static program.
func (p *Parts) StandinInitrd(ctx context.Context, agent string) (string, error) {
	return p.initrd(ctx, "standin", agent, standinPackages)
}

// KataInitrd makes the initrd with an agent of Kata's.
func (p *Parts) KataInitrd(ctx context.Context, agent string) (string, error) {
	return p.initrd(ctx, "kata", agent, agentPackages)
}

// StandinBase makes what all initrds with the stand-in's agent have in common.
func (p *Parts) StandinBase(ctx context.Context) (string, error) {
	return p.guestBase(ctx, "standin", standinPackages)
}

// KataBase makes what all initrds with an agent of Kata's have in common.
func (p *Parts) KataBase(ctx context.Context) (string, error) {
	return p.guestBase(ctx, "kata", agentPackages)
}

// initrd is two archives in one file: the guest's system, which rarely changes,
// and the agent on top of it.
func (p *Parts) initrd(ctx context.Context, kind, agent string, packages []string) (string, error) {
	base, err := p.guestBase(ctx, kind, packages)
	if err != nil {
		return "", err
	}
	baseKey, err := os.ReadFile(p.Build(".keys", "guest_"+kind+".cpio"))
	if err != nil {
		return "", fmt.Errorf("initrd: %w", err)
	}
	agentKey, err := fileKey(agent)
	if err != nil {
		return "", fmt.Errorf("initrd: %w", err)
	}
	// The name contains the agent's digest, so that a running testbed keeps its
	// initrd.
	name := fmt.Sprintf("initrd/%s-%s.cpio", kind, agentKey[:12])
	path, err := p.once(ctx, name, keyOf(string(baseKey), agentKey), func(ctx context.Context, path string) error {
		return pack(ctx, path, "agent", base, agent)
	})
	if err != nil {
		return "", err
	}
	return path, dropOld(path, 24*time.Hour)
}

// dropOld removes files beside path that have not been used for age: each
// change to an agent leaves an initrd behind.
func dropOld(path string, age time.Duration) error {
	now := time.Now()
	if err := os.Chtimes(path, now, now); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > age {
			_ = os.Remove(filepath.Join(filepath.Dir(path), e.Name())) // another process may have removed it
		}
	}
	return nil
}

// guestBase makes the guest's system without an agent.
func (p *Parts) guestBase(ctx context.Context, kind string, packages []string) (string, error) {
	_, version, err := Kernel()
	if err != nil {
		return "", err
	}
	busybox, err := fileKey(busyboxPath)
	if err != nil {
		return "", fmt.Errorf("guest: %w", err)
	}
	key := keyOf(append([]string{rootScript, version, busybox, string(guestInit)}, packages...)...)
	return p.once(ctx, "guest/"+kind+".cpio", key, func(ctx context.Context, path string) error {
		debs, err := p.fetch(ctx, packages...)
		if err != nil {
			return err
		}
		init := path + ".init"
		defer os.Remove(init)
		if err := os.WriteFile(init, guestInit, 0o755); err != nil {
			return err
		}
		args := []string{"initrd", init, version}
		for _, deb := range debs {
			args = append(args, deb.Path)
		}
		return pack(ctx, path, args...)
	})
}

// pack runs the script root.
func pack(ctx context.Context, path string, args ...string) error {
	return run(ctx, "", "bash", append([]string{"-c", rootScript, "root", path}, args...)...)
}

// fetch downloads packages with their dependencies. A part that exists stays as
// it is: newer packages come only with an empty build directory.
func (p *Parts) fetch(ctx context.Context, packages ...string) ([]debian.Package, error) {
	return debian.Fetch(ctx, debian.Request{Suite: suite, Packages: packages, Dir: p.Build("apt", suite)})
}

// busyboxPath is Debian's static busybox.
const busyboxPath = "/bin/busybox"
