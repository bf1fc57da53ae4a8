package guestagent

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/api"
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
		files = append(files, &api.OpenFile{Path: name, Size: 5})
	}
	got, err := changedFiles(root, files)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"/grown (has 6 bytes, had 5)", "/shrunk (has 1 bytes, had 5)", "/gone (is gone", "/escape (is gone"}
	if len(got) != len(want) {
		t.Fatalf("changedFiles = %q, want %q", got, want)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("changedFiles[%d] = %q, want %q", i, got[i], want[i])
		}
	}
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
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stdin.Close(); _ = cmd.Wait() }()
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("proc"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := openFiles([]int{cmd.Process.Pid}, mounts)
	if err != nil {
		t.Fatal(err)
	}
	sizes := make(map[string]uint64)
	for _, o := range got {
		sizes[o.GetPath()] = o.GetSize()
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
