// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// checkNames looks at this process.
func checkNames(t *testing.T) (Names, []string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("enters a mount namespace and reads the file of a socket")
	}
	c, err := Look(t.Context(), os.Getpid(), []int{os.Getpid()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	findings, err := c.CheckNames(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, f := range findings {
		texts = append(texts, f.String())
	}
	return c.Names, texts
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestNamesOfOpenFiles(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(dir string) error
		want    string // the name in the directory
		refused string
	}{
		"as it was":            {func(string) error { return nil }, "", ""},
		"renamed":              {func(d string) error { return os.Rename(d+"/a", d+"/b") }, "", ""}, // the kernel follows
		"removed":              {func(d string) error { return os.Remove(d + "/a") }, "", ""},       // is in the image set
		"another link is left": {func(d string) error { return firstError(os.Link(d+"/a", d+"/b"), os.Remove(d+"/a")) }, "b", ""},
		"CRIU's link is left": {func(d string) error {
			return firstError(os.Link(d+"/a", d+"/b"), os.Link(d+"/a", d+"/link_remap.1"), os.Rename(d+"/b", d+"/m"), os.Remove(d+"/a"))
		}, "m", ""},
		"called deleted": {func(d string) error { return os.Rename(d+"/a", d+"/a (deleted)") }, "", ""},
		"a link elsewhere is left": {func(d string) error {
			return firstError(os.Mkdir(d+"/c", 0o700), os.Link(d+"/a", d+"/c/b"), os.Remove(d+"/a"))
		}, "", "renamed or moved to another directory"},
		"replaced, and a link is left": {func(d string) error {
			return firstError(os.Link(d+"/a", d+"/b"), os.Remove(d+"/a"), os.WriteFile(d+"/a", nil, 0o600))
		}, "", "another file has taken its name"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a")
			create(t, path)
			must(t, test.change(dir))
			names, findings := checkNames(t)
			want := ""
			if test.want != "" {
				want = filepath.Join(dir, test.want)
			}
			if have := names.Files[path]; have != want {
				t.Errorf("it is called %q, not %q", have, want)
			}
			if text := strings.Join(findings, "; "); test.refused == "" && text != "" || !strings.Contains(text, test.refused) {
				t.Errorf("findings %q, not %q", text, test.refused)
			}
		})
	}
}

// A pipe with a name is a file to CRIU, and so is a memory device.
func TestNamesOfOtherFiles(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes a device")
	}
	dir := t.TempDir()
	for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "null": unix.S_IFCHR} {
		path := filepath.Join(dir, name)
		must(t, unix.Mknod(path, mode|0o600, int(unix.Mkdev(1, 3))))
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		if names, findings := checkNames(t); len(names.Files)+len(findings) > 0 {
			t.Errorf("%s as it was: %v, %q", name, names.Files, findings)
		}
		must(t, os.Link(path, path+".2"), os.Remove(path))
		if names, findings := checkNames(t); names.Files[path] != path+".2" || len(findings) > 0 {
			t.Errorf("another link of %s is left: %v, %q", name, names.Files, findings)
		}
		must(t, os.WriteFile(path, nil, 0o600))
		if _, findings := checkNames(t); len(findings) != 1 || !strings.Contains(findings[0], "another file has taken its name") {
			t.Errorf("%s replaced: %q", name, findings)
		}
		f.Close()
	}
}

// A directory whose name leads elsewhere cannot be opened again, as a file could.
func TestNamesOfDirectories(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes mount namespaces")
	}
	for script, want := range map[string]string{
		"exec 3<d":                             "",
		"exec 3<d; mv d e":                     "", // the kernel follows
		"exec 3<d; rmdir d":                    "",
		"exec 3<d; rmdir d; mkdir d":           "",
		"exec 3<d; mount -t tmpfs t d":         "/d, which something else was mounted over",
		"cd d":                                 "",
		"cd d; mount -t tmpfs t $D/d":          "/d, which something else was mounted over",
		"cd d; mount -t tmpfs t $D/d; cd $D/d": "",
		"mount -t tmpfs t d; cd d":             "",
	} {
		cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c", "cd $D; mkdir d; "+script+"; echo ready; read line")
		cmd.Env = append(os.Environ(), "D="+t.TempDir())
		testproc.Ready(t, cmd)
		findings, err := look(t, cmd.Process.Pid).CheckNames(t.Context(), nil)
		must(t, err)
		if want == "" && len(findings) > 0 || want != "" && (len(findings) != 1 || !strings.Contains(findings[0].String(), want)) {
			t.Errorf("%s: findings %v, want %q", script, findings, want)
		}
	}
}

// A file that is fine is looked at once; of one that is not, everybody is named
// who has it open.
func TestAFileThatManyHaveOpen(t *testing.T) {
	dir := t.TempDir()
	file, other := create(t, dir+"/a"), create(t, dir+"/fine")
	pids := []int{os.Getpid()}
	for range 2 {
		cmd := exec.Command("sh", "-c", "echo ready; read line")
		cmd.ExtraFiles = []*os.File{other, file, other}
		testproc.Ready(t, cmd)
		pids = append(pids, cmd.Process.Pid)
	}
	c, err := Look(t.Context(), pids[0], pids, nil)
	must(t, err)
	for i, want := range []int{0, len(pids)} {
		if i > 0 {
			must(t, firstError(os.Link(dir+"/a", dir+"/b"), os.Remove(dir+"/a"), os.WriteFile(dir+"/a", nil, 0o600)))
			if c, err = Look(t.Context(), pids[0], pids, nil); err != nil {
				t.Fatal(err)
			}
		}
		findings, err := c.CheckNames(t.Context(), nil)
		must(t, err)
		if len(findings) != want {
			t.Errorf("%d findings, not %d: %v", len(findings), want, findings)
		}
	}
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func TestAMappedFileThatHasLostItsName(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(dir + "/sem.Xyz")
	must(t, err)
	must(t, f.Truncate(4096))
	data, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(data) //nolint:errcheck // the end of the test
	must(t, f.Close(), os.Link(dir+"/sem.Xyz", dir+"/sem.case"), os.Remove(dir+"/sem.Xyz"))
	names, findings := checkNames(t)
	if have := names.Files[dir+"/sem.Xyz"]; have != dir+"/sem.case" || len(findings) > 0 {
		t.Errorf("it is called %q; findings %q", have, findings)
	}
}

func TestTwoOpenFilesThatHadOneName(t *testing.T) {
	dir := t.TempDir()
	for i := range 2 {
		create(t, dir+"/a")
		must(t, os.Link(dir+"/a", fmt.Sprintf("%s/b%d", dir, i)), os.Remove(dir+"/a"))
	}
	_, findings := checkNames(t)
	if text := strings.Join(findings, "; "); !strings.Contains(text, "two files open that were called "+dir+"/a") {
		t.Errorf("findings %q", text)
	}
}

func TestAFileRemovedFromAReadOnlyMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts a file system")
	}
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	defer unix.Unmount(dir, unix.MNT_DETACH) //nolint:errcheck // the end of the test
	f := create(t, dir+"/app.conf")
	defer f.Close()
	must(t, os.Remove(dir+"/app.conf"))
	if _, findings := checkNames(t); len(findings) > 0 {
		t.Errorf("while it can be written to: %q", findings)
	}
	reader, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	must(t, err)
	defer reader.Close()
	must(t, f.Close(), unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	_, findings := checkNames(t)
	if text := strings.Join(findings, "; "); !strings.Contains(text, "file "+dir+"/app.conf open, which was removed or replaced on the read-only mount "+dir) {
		t.Errorf("findings %q", text)
	}
}

// namesIn looks at a shell in a mount namespace of its own, in a directory where a
// tmpfs of its own is mounted at t.
func namesIn(t *testing.T, script string, marked ...string) (dir string, names Names, findings string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes a mount namespace")
	}
	dir = t.TempDir()
	cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c", "cd "+dir+"; mkdir t; mount -t tmpfs t t; "+script+"; echo ready; read line")
	testproc.Ready(t, cmd)
	for i := range marked {
		marked[i] = filepath.Join(dir, marked[i])
	}
	c, err := Look(t.Context(), cmd.Process.Pid, []int{cmd.Process.Pid}, nil)
	must(t, err)
	list, err := c.CheckNames(t.Context(), marked)
	must(t, err)
	texts := make([]string, 0, len(list))
	for _, f := range list {
		texts = append(texts, f.String())
	}
	return dir, c.Names, strings.Join(texts, "; ")
}

// A tmpfs that is part of the image set has the links that CRIU makes, and can be
// written to for the time of the restore.
func TestNamesInTheImageSet(t *testing.T) {
	const elsewhere = "mkdir t/sub; : >t/sub/a; exec 3<t/sub/a; ln t/sub/a t/b; rm t/sub/a; rmdir t/sub"
	for name, test := range map[string]struct {
		script, linked, refused string
		marked                  []string
	}{
		"a link elsewhere is left":          {elsewhere, "t/sub/a", "", nil},
		"a link elsewhere, read-only":       {elsewhere + "; mount -o remount,ro,bind t", "t/sub/a", "", nil},
		"removed, read-only":                {": >t/a; exec 3<t/a; rm t/a; mount -o remount,ro,bind t", "", "", nil},
		"replaced, and a link is left":      {"exec 3>t/a; ln t/a t/b; rm t/a; echo new >t/a", "", "another file has taken its name", nil},
		"not part of it: elsewhere is left": {elsewhere, "", "renamed or moved to another directory", []string{"t"}},
		"not part of it: read-only":         {": >t/a; exec 3<t/a; rm t/a; mount -o remount,ro,bind t", "", "removed or replaced on the read-only mount", []string{"t"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir, names, findings := namesIn(t, test.script, test.marked...)
			if test.refused == "" && findings != "" || !strings.Contains(findings, test.refused) {
				t.Errorf("findings %q, not %q", findings, test.refused)
			}
			var want []string
			if test.linked != "" {
				want = append(want, filepath.Join(dir, test.linked))
			}
			var have []string
			for _, l := range names.Linked {
				have = append(have, l.Path)
			}
			if !slices.Equal(have, want) || len(names.Files) > 0 {
				t.Errorf("linked are %q, not %q; names %q", have, want, names.Files)
			}
		})
	}
}

// A file on a mount that init does not see has no name in init's tree.
func TestAFileOfANestedMountNamespace(t *testing.T) {
	_, _, findings := namesIn(t, "mkfifo go; unshare --mount sh -c 'mount -t tmpfs n t; echo >t/file; exec 4<t/file; echo >go; exec sleep 60' & read x <go; exec 3</proc/$!/fd/4; trap \"kill $!\" EXIT")
	if findings != "" {
		t.Errorf("findings %q", findings)
	}
}

func TestNamesOfListeningSockets(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(dir string) error
		want    string
		refused string
	}{
		"as it was":            {func(string) error { return nil }, "", ""},
		"renamed":              {func(d string) error { return os.Rename(d+"/s", d+"/t") }, "t", ""},
		"another link is left": {func(d string) error { return firstError(os.Link(d+"/s", d+"/t"), os.Remove(d+"/s")) }, "t", ""},
		"replaced":             {func(d string) error { return firstError(os.Rename(d+"/s", d+"/t"), os.WriteFile(d+"/s", nil, 0o600)) }, "t", ""},
		"removed":              {func(d string) error { return os.Remove(d + "/s") }, "", ""},
		"moved":                {func(d string) error { return firstError(os.Mkdir(d+"/c", 0o700), os.Rename(d+"/s", d+"/c/s")) }, "c/s", ""},
		"a link elsewhere is left": {func(d string) error {
			return firstError(os.Mkdir(d+"/c", 0o700), os.Link(d+"/s", d+"/c/s"), os.Remove(d+"/s"))
		}, "", "moved to another directory"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "") // short enough for an address
			must(t, err)
			defer os.RemoveAll(dir)
			l, err := net.Listen("unix", dir+"/s")
			must(t, err)
			defer l.Close()
			must(t, test.change(dir))
			names, findings := checkNames(t)
			want := map[string]bool{}
			if test.want != "" {
				want[filepath.Join(dir, test.want)] = true
			}
			for _, name := range names.Sockets {
				if !want[name] {
					t.Errorf("it is called %s", name)
				}
				delete(want, name)
			}
			if len(want) > 0 {
				t.Errorf("it has no other name, and not %v", want)
			}
			if text := strings.Join(findings, "; "); test.refused == "" && text != "" || !strings.Contains(text, test.refused) {
				t.Errorf("findings %q, not %q", text, test.refused)
			}
		})
	}
}

// A device that CRIU cannot open again is found, and none of the usual ones.
func TestDevices(t *testing.T) {
	for name, want := range map[string]bool{"/dev/null": true, "/dev/urandom": true, "/dev/tty": true, "/dev/ptmx": true, "/dev/fuse": false, "/dev/net/tun": false, "/dev/loop0": false, "/dev/kvm": false} {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			continue // not on this machine
		}
		if got := restorableDevice(&st); got != want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// Memory of a device is in no image set, but for zeros.
func TestMappedDevices(t *testing.T) {
	for name, want := range map[string]int{"/dev/zero": 0, "/dev/null": 1} {
		self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "self"}
		s := nameSearch{c: &Container{Root: self}}
		if _, err := s.file(self, name, name, nil); err != nil || len(s.findings) != want {
			t.Errorf("%s: %v, %v", name, s.findings, err)
		}
	}
}

func TestALargeFileThatWasRemoved(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "file"))
	if err := unix.Fallocate(int(f.Fd()), 0, 0, GhostLimit-1<<20); err != nil {
		t.Skipf("no room: %v", err)
	}
	must(t, os.Remove(f.Name()))
	if _, findings := checkNames(t); len(findings) > 0 {
		t.Errorf("findings %q", findings)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, GhostLimit-1<<20, 2<<20); err != nil {
		t.Skipf("no room: %v", err)
	}
	if _, findings := checkNames(t); len(findings) != 1 || !strings.Contains(findings[0], "which was removed and has 1025 MiB") {
		t.Errorf("findings %q", findings)
	}
}

func TestDevicesThatCRIUOpensAgain(t *testing.T) {
	for _, tt := range []struct {
		name         string
		kind         uint32
		major, minor uint32
		want         bool
	}{
		{"/dev/null", unix.S_IFCHR, 1, 3, true},
		{"/dev/tty1", unix.S_IFCHR, 4, 1, false},
		{"/dev/ttyS0", unix.S_IFCHR, 4, 64, true},
		{"/dev/ptmx", unix.S_IFCHR, 5, 2, true},
		{"/dev/fuse", unix.S_IFCHR, 10, 229, false},
		{"/dev/pts/0", unix.S_IFCHR, 136, 0, true},
		{"/dev/ram0", unix.S_IFBLK, 1, 0, false},
	} {
		if have := restorableDevice(&unix.Stat_t{Mode: tt.kind | 0o600, Rdev: unix.Mkdev(tt.major, tt.minor)}); have != tt.want {
			t.Errorf("%s: %v", tt.name, have)
		}
	}
}
