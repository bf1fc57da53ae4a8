// SPDX-License-Identifier: Apache-2.0

package inside

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func anyMount(*mountinfo.Info) bool { return true }

// container is a process in a mount namespace with a root of its own, which a
// script has furnished.
func container(t *testing.T, script string) int {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes a mount namespace")
	}
	root := t.TempDir()
	cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c", "mount -t tmpfs root "+root+"; cd "+root+"; mkdir bin proc old; cp /bin/busybox bin; mount -t proc proc proc; "+script+
		"; pivot_root . old; exec /bin/busybox sh -c '/bin/busybox umount -l /old; echo ready; read line'")
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Skip(err)
	}
	testproc.Ready(t, cmd)
	return cmd.Process.Pid
}

func open(t *testing.T, tree *Tree, path string) (string, error) {
	t.Helper()
	f, err := tree.OpenRegular(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data := make([]byte, 100)
	n, err := f.Read(data)
	return string(data[:n]), err
}

func TestNoPathLeavesTheTree(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("outside"), 0o600); err != nil {
		t.Fatal(err)
	}
	pid := container(t, "mkdir a; echo inside >a/file; ln -s file a/link; ln -s /a/file absolute; ln -s "+outside+" out; ln -s ../../../../.."+outside+" up; "+
		"ln -s /proc/self/root"+outside+" magic; mkfifo fifo")
	for name, open1 := range map[string]func() (*Tree, error){
		"of the namespace": func() (*Tree, error) { return Open(pid, anyMount) },
		"of the process":   func() (*Tree, error) { return OpenRoot(pid, anyMount) },
	} {
		tree, err := open1()
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]error{
			"/a/file": nil, "/a/link": nil, "/absolute": nil,
			"/out": unix.ENOENT, "/up": unix.ENOENT, "/magic": unix.ELOOP, "/proc/self/exe": unix.ELOOP, "/fifo": regular.ErrNot, "/a": regular.ErrNot, "/none": unix.ENOENT,
		} {
			content, err := open(t, tree, path)
			if !errors.Is(err, want) || want == nil && content != "inside\n" {
				t.Errorf("%s: %s: %q, %v", name, path, content, err)
			}
		}
		if !tree.IsMountPoint("/proc") || tree.IsMountPoint("/a") {
			t.Errorf("%s: mount points %v", name, tree.points)
		}
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
	}
}

// What may block is not entered, on no path, and no link is followed that might
// lead there.
func TestWhatMayBlockIsNotEntered(t *testing.T) {
	pid := container(t, "mkdir a slow slow/below; echo inside >a/file; ln -s file a/link; mount -t tmpfs slow slow; echo slow >slow/file; mkdir slow/below; mount -t tmpfs below slow/below; echo below >slow/below/file; ln -s /slow lead")
	slow := func(m *mountinfo.Info) bool { return m.Mountpoint != "/slow" }
	tree, err := Open(pid, slow)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	for path, want := range map[string]error{
		"/a/file": nil, "/a/link": unix.ELOOP, "/lead/file": unix.ELOOP,
		"/slow": ErrMayBlock, "/slow/": ErrMayBlock, "/slow/file": ErrMayBlock, "/slow/below/file": ErrMayBlock, "/slower": unix.ENOENT,
	} {
		if content, err := open(t, tree, path); !errors.Is(err, want) {
			t.Errorf("%s: %q, %v", path, content, err)
		}
	}
	all, err := Open(pid, func(*mountinfo.Info) bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	if _, err := all.Open("/a/file", unix.O_PATH); !errors.Is(err, ErrMayBlock) {
		t.Errorf("below a root that may block: %v", err)
	}
}

func TestAProcessWhoseRootIsNoMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("changes the root of a process")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "sh"), read(t, "/bin/busybox"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("chroot", dir, "/sh", "-c", "echo ready; read line")
	testproc.Ready(t, cmd)
	tree, err := OpenRoot(cmd.Process.Pid, anyMount)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if _, err := tree.Open("/sh", unix.O_PATH); !errors.Is(err, ErrMayBlock) {
		t.Errorf("nobody knows what it is on: %v", err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Skip(err)
	}
	return data
}

func TestOnlyAMountIsOpened(t *testing.T) {
	pid := container(t, "mkdir dev dev/shm dir real; mount -t tmpfs shm dev/shm; touch dev/shm/file; ln -s dev/shm shm; ln -s /dev lead; mount --bind dir real")
	tree, err := Open(pid, anyMount)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	fd, err := tree.Open("/dev/shm", unix.O_PATH)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/dev/shm": "", "/shm": "not a directory", "/lead/shm": "symbolic links", "/dir": ErrNotMounted.Error(), "/real": ErrNotMounted.Error(), "/none": "no such file"} {
		fd, err := tree.OpenMount(path, st.Dev)
		if err == nil {
			unix.Close(fd)
		}
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
