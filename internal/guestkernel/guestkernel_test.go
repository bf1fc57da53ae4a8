// SPDX-License-Identifier: Apache-2.0

package guestkernel

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/configs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
)

// makefile stands for the kernel's: its configuration tool drops the options
// that the file absent names, and what is built is the configuration.
const makefile = `
drop = grep -v -x -F -f $(CURDIR)/absent
olddefconfig:
	$(drop) $(O)/.config > $(O)/next && mv $(O)/next $(O)/.config
allnoconfig:
	$(drop) $(KCONFIG_ALLCONFIG) > $(O)/.config
vmlinux Image:
	test ! -e $(CURDIR)/broken || { echo "cannot compile" >&2; false; }
	mkdir -p $(O)/arch/x86/boot $(O)/arch/arm64/boot $(O)/include/config
	echo 6.12.0-kata-checkpoint > $(O)/include/config/kernel.release
	echo $@ $(ARCH) > $(O)/vmlinux && cp $(O)/vmlinux $(O)/arch/arm64/boot/Image
bzImage: vmlinux
	echo $@ > $(O)/arch/x86/boot/bzImage
Image.gz: Image
	echo $@ > $(O)/arch/arm64/boot/Image.gz
`

type sources struct {
	t   *testing.T
	dir string
	o   *Options
}

func newSources(t *testing.T) *sources {
	for _, tool := range []string{"make", "tar", "xz"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	s := &sources{t: t, dir: t.TempDir()}
	// What only the kernel's own build needs may be missing.
	for _, tool := range tools {
		if _, err := exec.LookPath(tool[0]); err != nil {
			s.write("bin/"+tool[0], "#!/bin/sh\n", 0o755)
		}
	}
	t.Setenv("PATH", filepath.Join(s.dir, "bin")+":"+os.Getenv("PATH"))
	t.Setenv("KCONFIG_ALLCONFIG", "/nowhere") // must not reach make
	if _, err := os.Stat("/usr/include/libelf.h"); err != nil {
		libelf = s.write("libelf.h", "", 0o644)
		t.Cleanup(func() { libelf = "/usr/include/libelf.h" })
	}
	s.write("linux/Kconfig", "", 0o644)
	s.write("linux/Makefile", makefile, 0o644)
	s.write("linux/absent", "CONFIG_OLD=y\n", 0o644)
	s.write("config", "CONFIG_VIRTIO=y\nCONFIG_OLD=y\n# CONFIG_CHECKPOINT_RESTORE is not set", 0o644)
	s.o = &Options{Source: s.path("linux"), KataConfig: s.path("config"), Out: s.path("out"), Work: s.path("work"), Arch: "amd64", Output: os.Stderr}
	return s
}

func (s *sources) path(name string) string { return filepath.Join(s.dir, name) }

func (s *sources) write(name, text string, mode os.FileMode) string {
	s.t.Helper()
	path := s.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func (s *sources) build() *Kernel {
	s.t.Helper()
	k, err := Build(s.t.Context(), s.o)
	if err != nil {
		s.t.Fatal(err)
	}
	return k
}

func (s *sources) read(name string) string {
	s.t.Helper()
	data, err := os.ReadFile(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(data)
}

func TestBuild(t *testing.T) {
	s := newSources(t)
	k := s.build()
	if k.Path != s.path("out/"+Name) || k.Release != "6.12.0-kata-checkpoint" || !cmp.Equal(k.Dropped, []string{"CONFIG_OLD"}) {
		t.Errorf("got %+v", k)
	}
	if s.read("out/"+Name) != "vmlinux x86_64\n" || s.read("out/"+compressed) != "bzImage\n" {
		t.Error("what was built is elsewhere")
	}
	for _, name := range []string{Name, compressed} {
		// `check` and `install` read it there.
		missing, modules, err := check.LacksOptions(s.path("out/" + name))
		if err != nil || len(missing)+len(modules) > 0 {
			t.Errorf("%s lacks %v, %v: %v", name, missing, modules, err)
		}
	}
	if config := s.read("out/" + Name + ".config"); !strings.Contains(config, "CONFIG_VIRTIO=y\n") || !strings.Contains(config, `CONFIG_LOCALVERSION="-kata-checkpoint"`) {
		t.Errorf("the configuration is %s", config)
	}
}

func TestFromAnArchive(t *testing.T) {
	s := newSources(t)
	if out, err := exec.CommandContext(t.Context(), "tar", "-C", s.dir, "-cJf", s.path("linux.tar.xz"), "linux").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.o.Source = s.path("linux.tar.xz")
	s.o.ConfigOnly = true
	if k := s.build(); k.Path != s.path("out/"+Name+".config") || k.Release != "" {
		t.Errorf("got %+v", k)
	}
	if _, err := os.Stat(s.path("out/" + Name)); err == nil {
		t.Error("a kernel was built")
	}
}

// What is named is found from the working directory, although make runs in
// others.
func TestRelativePaths(t *testing.T) {
	s := newSources(t)
	t.Chdir(s.dir)
	var steps []string
	s.o.Source, s.o.KataConfig, s.o.Out, s.o.Work = "linux", "config", "out", "work"
	s.o.Step = func(format string, args ...any) { steps = append(steps, fmt.Sprintf(format, args...)) }
	s.build()
	if s.read("out/"+Name) != "vmlinux x86_64\n" {
		t.Error("what was built is elsewhere")
	}
	if len(steps) != 2 || !strings.HasPrefix(steps[0], "configuring") || !strings.HasPrefix(steps[1], "compiling") {
		t.Errorf("the steps are %q", steps)
	}
}

// Kata's fragments: those of the architecture, and the common ones without
// those that exclude it.
func TestFromKataSources(t *testing.T) {
	s := newSources(t)
	const dir = "kata/tools/packaging/kernel/configs/fragments/"
	s.write(dir+"common/a.conf", "CONFIG_A=y", 0o644)
	s.write(dir+"common/b.conf", "# !arm64 !s390\nCONFIG_B=y\n", 0o644)
	s.write(dir+"arm64/c.conf", "CONFIG_C=y\n", 0o644)
	s.write(dir+"x86_64/d.conf", "CONFIG_D=y\n", 0o644)
	s.write("linux/absent", "CONFIG_MEM_SOFT_DIRTY=y\nCONFIG_OLD=y\nCONFIG_GONE=y\n", 0o644) // arm64 lacks the first
	s.write(dir+"common/e.conf", "CONFIG_OLD=y\nCONFIG_GONE=y\n", 0o644)
	s.write(dir+"whitelist.conf", "# not in every kernel\nCONFIG_OLD\nCONFIG_GO\n", 0o644)
	s.o.KataConfig, s.o.KataSource, s.o.Arch = "", s.path("kata"), "arm64"
	if k := s.build(); !cmp.Equal(k.Dropped, []string{"CONFIG_GONE"}) {
		t.Errorf("dropped are %v", k.Dropped)
	}
	config := options([]byte(s.read("out/" + Name + ".config")))
	for name, want := range map[string]string{"A": "y", "B": "", "C": "y", "D": "", "CHECKPOINT_RESTORE": "y"} {
		if config[name] != want {
			t.Errorf("CONFIG_%s is %q, want %q", name, config[name], want)
		}
	}
	if s.read("out/"+Name) != "Image arm64\n" {
		t.Error("not the image of arm64")
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(*sources)
		words []string
	}{
		"an option that the sources lack": {
			func(s *sources) { s.write("linux/absent", "CONFIG_TIME_NS=y\n", 0o644) },
			[]string{"CONFIG_TIME_NS=y", "--source"},
		},
		"a damaged archive": {
			func(s *sources) { s.o.Source = s.write("linux.tar.xz", "no archive", 0o644) },
			[]string{"unpack", "linux.tar.xz", "not recognized"},
		},
		"no sources":         {func(s *sources) { s.o.Source = s.path("nothing") }, []string{"no such file"}},
		"not sources":        {func(s *sources) { s.o.Source = s.dir }, []string{"no kernel sources"}},
		"not a config":       {func(s *sources) { s.o.KataConfig = s.path("linux/Makefile") }, []string{"no kernel configuration"}},
		"no fragments":       {func(s *sources) { s.o.KataSource = s.dir }, []string{"no sources of Kata"}},
		"another machine":    {func(s *sources) { s.o.Arch = "s390x" }, []string{"s390x"}},
		"a compiler's error": {func(s *sources) { s.write("linux/broken", "", 0o644) }, []string{"make vmlinux", "cannot compile"}},
		"no tools":           {func(s *sources) { s.t.Setenv("PATH", "/nowhere") }, []string{"apt-get install make gcc flex"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSources(t)
			c.fault(s)
			_, err := Build(t.Context(), s.o)
			if err == nil {
				t.Fatal("it was built")
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error lacks %q: %v", w, err)
				}
			}
			if _, err := os.Stat(s.path("out/" + Name)); err == nil {
				t.Error("there is a kernel")
			}
		})
	}
}

func TestNewest(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"config-6.9.1-100", "config-6.18.35-202", "config-6.18.36-203-confidential", "config-6.19.1-204-debug"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := newest(dir + "/config-*"); err != nil || filepath.Base(got) != "config-6.18.35-202" {
		t.Errorf("got %s, %v", got, err)
	}
	if got, err := newest(dir + "/none-*"); err != nil || got != "" {
		t.Errorf("got %s, %v", got, err)
	}
}

// What is checked is what the fragment sets.
func TestFragment(t *testing.T) {
	for name, a := range arches {
		have := options([]byte(a.fragment()))
		for _, o := range check.KernelOptions {
			if want := o != "MEM_SOFT_DIRTY" || !a.needsNoMemSoftDirty; (have[o] == "y") != want {
				t.Errorf("%s: CONFIG_%s is %q", name, o, have[o])
			}
		}
	}
	// Kata's check of its fragments takes a name in a comment for a setting.
	text := configs.KernelFragment
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") && strings.Contains(line, "CONFIG_") && !strings.HasSuffix(strings.TrimSpace(line), "is not set") {
			t.Errorf("a comment names an option with its prefix: %s", line)
		}
	}
}

func TestOptions(t *testing.T) {
	got := options([]byte("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_B=y\nCONFIG_C=m\n# CONFIG_A is not set\nother\n"))
	if want := map[string]string{"B": "y", "C": "m"}; !cmp.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}
