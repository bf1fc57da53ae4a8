// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func TestChangedFilesNamesWhatARestoreWouldRefuse(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{"same": "12345", "grown": "123456", "shrunk": "1"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(root, "escape")); err != nil {
		t.Fatal(err)
	}
	var files []*api.OpenFile
	for _, name := range []string{"/same", "/grown", "/shrunk", "/gone", "/escape", "/dev/shm/in-the-images"} {
		files = append(files, &api.OpenFile{Path: []byte(name), Size: 5})
	}
	if err := os.WriteFile(filepath.Join(root, "log"), []byte("1234567890"), 0o600); err != nil {
		t.Fatal(err)
	}
	files = append(files, &api.OpenFile{Path: []byte("/log"), Size: 5, MayGrow: true}, &api.OpenFile{Path: []byte("/rotated"), MayGrow: true})
	got, err := ChangedFiles(chrooted(t, root), files)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"/grown (has 6 bytes, had 5)", "/shrunk (has 1 bytes, had 5)", "/gone (is gone", "/escape (is gone", "/rotated (is gone"}
	if len(got) != len(want) {
		t.Fatalf("changedFiles = %q, want %q", got, want)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("changedFiles[%d] = %q, want %q", i, got[i], want[i])
		}
	}
}

// chrooted is the tree of a process with a root directory of its own.
func chrooted(t *testing.T, root string) *inside.Tree {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("changes the root of a process")
	}
	// The root is that of a mount, as a container's is.
	must(t, unix.Mount(root, root, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	sleep := filepath.Join(root, "sleep")
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip(err)
	}
	must(t, os.WriteFile(sleep, busybox, 0o700))
	cmd := exec.Command("/sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	tree, err := inside.OpenRoot(cmd.Process.Pid, func(*mountinfo.Info) bool { return true })
	must(t, err)
	t.Cleanup(func() { _ = tree.Close() })
	return tree
}

func TestOpenFilesSeesDescriptorsAndMappings(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	if err := os.WriteFile(open, []byte("12345678"), 0o600); err != nil {
		t.Fatal(err)
	}
	deleted, err := os.Create(filepath.Join(dir, "deleted"))
	if err != nil {
		t.Fatal(err)
	}
	defer deleted.Close()
	if err := os.Remove(deleted.Name()); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(open)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
	kernels, err := os.Open("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	defer kernels.Close()
	cmd.ExtraFiles = []*os.File{f, deleted, kernels}
	testproc.Ready(t, cmd)
	got, err := look(t, cmd.Process.Pid).OpenFiles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sizes := make(map[string]uint64)
	for _, o := range got {
		sizes[string(o.GetPath())] = o.GetSize()
	}
	shell, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if sizes[open] != 8 || sizes[shell] == 0 {
		t.Errorf("openFiles = %v, want %s with 8 bytes and %s", sizes, open, shell)
	}
	for path := range sizes {
		if strings.Contains(path, "deleted") || strings.HasPrefix(path, "/proc/") {
			t.Errorf("openFiles names %s, which has no name, or no size", path)
		}
	}
}

// A process in a mount namespace of its own has files open that init does not see
// under their names, or that the images contain.
func TestOpenFilesOfANestedNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes a mount namespace")
	}
	dir := t.TempDir()
	memory := filepath.Join(dir, "memory")
	must(t, os.Mkdir(memory, 0o700), os.Mkdir(filepath.Join(dir, "own"), 0o700), os.Mkdir(filepath.Join(dir, "bind"), 0o700))
	must(t, unix.Mount("t", memory, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(memory, unix.MNT_DETACH)) })
	must(t, create(t, filepath.Join(dir, "seen")).Close())
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "cd "+dir+" && mount -t tmpfs t own && mount --bind . bind && exec 4<seen 5>own/file 6<bind/seen 7>memory/file && echo ready && read line")
	testproc.Ready(t, cmd)
	c, err := LookAtFiles(t.Context(), os.Getpid(), []int{os.Getpid(), cmd.Process.Pid}, nil)
	must(t, err)
	files, err := c.OpenFiles(t.Context())
	must(t, err)
	var have []string
	for _, f := range files {
		if name, ok := strings.CutPrefix(string(f.GetPath()), dir+"/"); ok {
			have = append(have, name)
		}
	}
	if !slices.Equal(have, []string{"seen"}) {
		t.Errorf("open files %q", have)
	}
}

// A process that is in the container's mount namespace may have got hold of a file
// in another one.
func TestOpenFilesOfAnothersNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes a mount namespace")
	}
	dir := t.TempDir()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "cd "+dir+" && mount -t tmpfs t . && cd "+dir+" && echo data >opened && echo data >mapped && echo ready && read line")
	testproc.Ready(t, cmd)
	inside := fmt.Sprintf("/proc/%d/cwd/", cmd.Process.Pid)
	opened, err := os.Open(inside + "opened")
	must(t, err)
	defer opened.Close()
	mapped, err := os.Open(inside + "mapped")
	must(t, err)
	memory, err := unix.Mmap(int(mapped.Fd()), 0, 5, unix.PROT_READ, unix.MAP_PRIVATE)
	must(t, err, mapped.Close())
	defer func() { _ = unix.Munmap(memory) }()
	c := look(t, os.Getpid(), cmd.Process.Pid)
	if !slices.ContainsFunc(c.Root.Files, func(f File) bool { return f.Name == dir+"/opened" }) {
		t.Fatalf("it is not open: %+v", c.Root.Files)
	}
	files, err := c.OpenFiles(t.Context())
	must(t, err)
	for _, f := range files {
		if strings.HasPrefix(string(f.GetPath()), dir) {
			t.Errorf("%s is listed", f.GetPath())
		}
	}
}

// Names of files are bytes.
func TestOpenFilesWithAnyName(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "caf\xe9\n\x1b.txt"))
	files, err := look(t, os.Getpid()).OpenFiles(t.Context())
	must(t, err)
	data, err := proto.Marshal(&api.CheckpointResponse{OpenFiles: files})
	must(t, err)
	got := &api.CheckpointResponse{}
	must(t, proto.Unmarshal(data, got))
	if !slices.ContainsFunc(got.GetOpenFiles(), func(o *api.OpenFile) bool { return string(o.GetPath()) == f.Name() }) {
		t.Errorf("%q is not listed", f.Name())
	}
	changed, err := ChangedFiles(chrooted(t, t.TempDir()), []*api.OpenFile{{Path: []byte("/caf\xe9\n")}})
	if err != nil || len(changed) != 1 || !strings.HasPrefix(changed[0], "/caf?? (is gone") {
		t.Errorf("changed: %q, %v", changed, err)
	}
}

// A log may grow, unless somebody reads it, too, or writes to the middle of it.
func TestOpenFilesThatMayGrow(t *testing.T) {
	dir := t.TempDir()
	open := func(name string, flags int) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), flags|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	const appendOnly = os.O_WRONLY | os.O_APPEND
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
	cmd.ExtraFiles = []*os.File{
		open("log", appendOnly), open("log", appendOnly),
		open("read", appendOnly), open("read", os.O_RDONLY),
		open("written", os.O_WRONLY), open("both", os.O_RDWR|os.O_APPEND),
	}
	testproc.Ready(t, cmd)
	got, err := look(t, cmd.Process.Pid).OpenFiles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mayGrow := make(map[string]bool)
	for _, o := range got {
		if name, ok := strings.CutPrefix(string(o.GetPath()), dir+"/"); ok {
			mayGrow[name] = o.GetMayGrow()
		}
	}
	want := map[string]bool{"log": true, "read": false, "written": false, "both": false}
	if diff := cmp.Diff(want, mayGrow); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What is in the pod's /dev/shm stays, so a restore that needs another file by
// the same name cannot be.
func TestChangedShmNamesWhatARestoreCannotReplace(t *testing.T) {
	shm := t.TempDir()
	for name, content := range map[string]string{"same": "12345", "grown": "123456", "file": "12345"} {
		if err := os.WriteFile(filepath.Join(shm, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{os.Mkdir(filepath.Join(shm, "directory"), 0o700), os.Symlink("same", filepath.Join(shm, "link"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var files []*api.OpenFile
	for _, path := range []string{"/dev/shm/same", "/dev/shm/grown", "/dev/shm/brought", "/dev/shm/directory", "/dev/shm/link", "/dev/shm/file/below", "/dev/shm/../escape", "/elsewhere"} {
		files = append(files, &api.OpenFile{Path: []byte(path), Size: 5})
	}
	dir, err := unix.Open(shm, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(dir)
	got, err := ChangedShm(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"/dev/shm/grown (has 6 bytes, had 5)", "/dev/shm/directory (is not a file)", "/dev/shm/link (", "/dev/shm/file/below (", "/dev/shm/../escape ("}
	if len(got) != len(want) {
		t.Fatalf("changedShm = %q, want %q", got, want)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("changedShm[%d] = %q, want %q", i, got[i], want[i])
		}
	}
}

// Files of /dev/shm are listed, by descriptor or mapping, and those of other
// file systems in memory, which CRIU's images have, are not.
func TestOpenFilesOfMemory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	var mounts []*mountinfo.Info
	files := make(map[string]*os.File)
	for _, at := range []string{ShmDir, "/run/elsewhere"} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Skipf("mount a tmpfs: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		for _, name := range []string{"open", "mapped"} {
			f, err := os.Create(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(int64(os.Getpagesize())); err != nil {
				t.Fatal(err)
			}
			files[at+" "+name] = f
		}
		f := files[at+" mapped"]
		memory, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Munmap(memory) }()
		f.Close()
		m, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		if err != nil || len(m) != 1 {
			t.Fatal(m, err)
		}
		m[0].Mountpoint = at
		mounts = append(mounts, m[0])
	}
	c := look(t, os.Getpid())
	c.mounts.root = mounts
	got, err := c.OpenFiles(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	listed := make(map[string]bool)
	for _, o := range got {
		listed[string(o.GetPath())] = true
	}
	for name, f := range files {
		if want := strings.HasPrefix(name, ShmDir); listed[f.Name()] != want {
			t.Errorf("%s: listed %t, want %t", name, listed[f.Name()], want)
		}
	}
}

func TestWrittenFilesAreThoseThatAProcessCanWriteTo(t *testing.T) {
	dir := t.TempDir()
	open := func(name string, flags int) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	for _, name := range []string{"written", "read", "deleted", "mapped", "private"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, os.Getpagesize()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
	cmd.ExtraFiles = []*os.File{open("written", os.O_WRONLY), open("written", os.O_RDWR), open("read", os.O_RDONLY), open("deleted", os.O_RDWR)}
	if err := os.Remove(filepath.Join(dir, "deleted")); err != nil {
		t.Fatal(err)
	}
	testproc.Ready(t, cmd)
	for name, kind := range map[string]int{"mapped": unix.MAP_SHARED, "private": unix.MAP_PRIVATE} {
		memory, err := unix.Mmap(int(open(name, os.O_RDONLY).Fd()), 0, os.Getpagesize(), unix.PROT_READ, kind)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(memory) })
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}

	for pid, want := range map[int]string{cmd.Process.Pid: "written", os.Getpid(): "mapped"} {
		c := look(t, pid)
		on := func(m *mountinfo.Info) bool {
			return m != nil && unix.Mkdev(uint32(m.Major), uint32(m.Minor)) == st.Dev
		}
		files, err := c.writtenFiles(t.Context(), on)
		must(t, err)
		var names []string
		for _, f := range files {
			name, err := os.Readlink(f.Link)
			if err != nil {
				t.Fatal(err)
			}
			if filepath.Dir(name) == dir {
				names = append(names, filepath.Base(name))
			}
		}
		if pid == os.Getpid() {
			names = slices.DeleteFunc(names, func(name string) bool { return name == "written" }) // the test has it, too
		}
		if fmt.Sprint(names) != "["+want+"]" {
			t.Errorf("WrittenFiles of process %d = %v, want %s", pid, files, want)
		}
		if files, err = c.WrittenFiles(t.Context()); err != nil || len(files) > 0 {
			t.Errorf("files that the host shares: %v, %v", files, err)
		}
	}
}
