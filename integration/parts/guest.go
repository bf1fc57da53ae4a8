package parts

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

//go:embed guest/init
var guestInit []byte

// suite is the Debian release that the guest's programs come from, the one that the guest bundle's CRIU comes from, too.
const suite = "forky"

// Guest packages. Kata's agent needs the libraries, and its debug console a shell that starts without an argv[0], which busybox cannot.
// The stand-in's agent has containers run by runc.
var (
	agentPackages   = []string{"bash", "libseccomp2", "libgcc-s1"}
	standinPackages = []string{"bash", "runc"}
)

// guestModules are loaded by the guest's /init: what the machine's devices need; what CRIU asks the kernel for (the diag modules,
// nf_tables: it does not start without netlink's netfilter family); what tests use.
var guestModules = []string{
	"virtio_pci", "virtiofs", "vmw_vsock_virtio_transport", "virtio_net", "virtio_blk", "overlay",
	"unix_diag", "inet_diag", "tcp_diag", "udp_diag", "raw_diag", "af_packet_diag", "netlink_diag", "nf_tables",
	"tun", "veth", "vsock_loopback",
}

// Kernel finds the newest of the host's Debian cloud kernels: image and version.
func Kernel() (image, version string, err error) {
	found, _ := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if len(found) == 0 {
		return "", "", errors.New("no cloud kernel in /boot")
	}
	sort.Slice(found, func(i, k int) bool { return lessVersion(found[i], found[k]) })
	image = found[len(found)-1]
	return image, strings.TrimPrefix(filepath.Base(image), "vmlinuz-"), nil
}

// lessVersion orders names by the numbers in them.
func lessVersion(a, b string) bool {
	number := func(s string) (int, string) {
		n, i := 0, 0
		for ; i < len(s) && s[i] >= '0' && s[i] <= '9'; i++ {
			n = n*10 + int(s[i]-'0')
		}
		return n, s[i:]
	}
	for a != "" && b != "" {
		m, restA := number(a)
		n, restB := number(b)
		switch {
		case m != n:
			return m < n
		case len(restA) == len(a) && len(restB) == len(b):
			if a[0] != b[0] {
				return a[0] < b[0]
			}
			restA, restB = a[1:], b[1:]
		}
		a, b = restA, restB
	}
	return len(a) < len(b)
}

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

// initrd is two archives in one file: the guest's system, which seldom changes, and the agent over it.
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
	// The agent's content is in the name: a running testbed keeps the initrd that it has.
	name := fmt.Sprintf("initrd/%s-%s.cpio", kind, agentKey[:12])
	path, err := p.once(ctx, name, keyOf(string(baseKey), agentKey), func(_ context.Context, path string) error {
		over := tree{}
		if err := over.copyFile("usr/bin/kata-agent", agent); err != nil {
			return err
		}
		return writeFile(path, func(w io.Writer) error {
			in, err := os.Open(base)
			if err != nil {
				return err
			}
			defer in.Close()
			if _, err := io.Copy(w, in); err != nil {
				return err
			}
			return over.writeCPIO(w)
		})
	})
	if err != nil {
		return "", err
	}
	return path, dropOld(path, 24*time.Hour)
}

// dropOld removes files beside path that nobody has asked for since a while: an agent under work leaves an initrd with every change.
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
			_ = os.Remove(filepath.Join(filepath.Dir(path), e.Name())) // somebody else may have
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
	const format = "1" // to be raised with every change below
	key := keyOf(append([]string{format, version, busybox, string(guestInit), strings.Join(guestModules, " ")}, packages...)...)
	return p.once(ctx, "guest/"+kind+".cpio", key, func(ctx context.Context, path string) error {
		debs, err := p.fetch(ctx, packages...)
		if err != nil {
			return err
		}
		t := guestSkeleton()
		for _, deb := range debs {
			if err := t.unpack(ctx, deb.Path, wanted); err != nil {
				return err
			}
		}
		if err := t.addBusybox(ctx, "usr/bin"); err != nil {
			return err
		}
		if err := t.addModules(ctx, version); err != nil {
			return err
		}
		return writeFile(path, t.writeCPIO)
	})
}

// fetch downloads packages with all that they depend on. Once made, a part stays as it is: newer packages come with `make clean` and an
// empty build directory only.
func (p *Parts) fetch(ctx context.Context, packages ...string) ([]debian.Package, error) {
	return debian.Fetch(ctx, debian.Request{Suite: suite, Packages: packages, Dir: p.Build("apt", suite)})
}

func guestSkeleton() tree {
	t := tree{}
	t.dir(0o755, "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "sys", "dev", "run", "mnt", "var", "etc", "layer")
	t.dir(0o700, "root")
	t.dir(0o777|os.ModeSticky, "tmp")
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		t.symlink(d, "usr/"+d)
	}
	t.file("init", 0o755, guestInit)
	t.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	t.file("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	t.file("etc/guest-modules", 0o644, []byte(strings.Join(guestModules, " ")+"\n"))
	return t
}

// wanted leaves out of packages what no guest reads: most of an initrd's size, which is time at every boot.
func wanted(p string) bool {
	for _, prefix := range []string{"usr/share/", "usr/lib/x86_64-linux-gnu/gconv/", "etc/", "var/"} {
		if strings.HasPrefix(p, prefix) {
			return false
		}
	}
	return true
}

const busyboxPath = "/bin/busybox"

// addBusybox adds Debian's static busybox to dir, with a link for every applet that has no program of that name yet.
func (t tree) addBusybox(ctx context.Context, dir string) error {
	out, err := exec.CommandContext(ctx, busyboxPath, "--list").Output()
	if err != nil {
		return fmt.Errorf("list applets: %w", err)
	}
	if err := t.copyFile(dir+"/busybox", busyboxPath); err != nil {
		return err
	}
	for _, applet := range strings.Fields(string(out)) {
		// The list names busybox itself, which must stay the program.
		taken := false
		for _, d := range []string{dir, "usr/bin", "usr/sbin"} {
			if _, ok := t[d+"/"+applet]; ok {
				taken = true
			}
		}
		if !taken {
			t.symlink(dir+"/"+applet, "busybox")
		}
	}
	return nil
}

// addModules adds the guest's kernel modules with those they need and their index.
func (t tree) addModules(ctx context.Context, version string) error {
	scratch, err := os.MkdirTemp("", "guest-modules-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	below := filepath.Join("lib/modules", version)
	var files []string
	for _, module := range guestModules {
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, "modprobe", "-D", "-S", version, module)
		cmd.Stdout = &out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("module %s of kernel %s: %w", module, version, err)
		}
		for line := range strings.Lines(out.String()) {
			if word := strings.Fields(line); len(word) > 1 && word[0] == "insmod" {
				files = append(files, strings.TrimPrefix(word[1], "/"))
			}
		}
	}
	for _, name := range []string{"modules.order", "modules.builtin", "modules.builtin.modinfo"} {
		files = append(files, filepath.Join(below, name))
	}
	for _, file := range files {
		data, err := os.ReadFile("/" + file)
		if err != nil {
			return err
		}
		to := filepath.Join(scratch, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(to, data, 0o644); err != nil {
			return err
		}
		if filepath.Base(file) == "overlay.ko" {
			t.symlink("overlay.ko", "/usr/"+file)
		}
	}
	if err := run(ctx, "", "depmod", "-b", scratch, version); err != nil {
		return err
	}
	return filepath.WalkDir(scratch, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(scratch, path)
		if err != nil {
			return err
		}
		return t.copyFile("usr/"+rel, path)
	})
}

// writeFile makes a file with what write gives.
func writeFile(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	return f.Close()
}
