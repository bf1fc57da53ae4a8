// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

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
		processes, err := inspect.Processes([]int{pid})
		if err != nil {
			t.Fatal(err)
		}
		files := inspect.WrittenFiles(processes, map[uint64]bool{st.Dev: true})
		var names []string
		for _, f := range files {
			name, err := os.Readlink(f)
			if err != nil {
				t.Fatal(err)
			}
			if filepath.Dir(name) == dir {
				names = append(names, filepath.Base(name))
			}
			if err := writeOutFile(t.Context(), f); err != nil {
				t.Error(err)
			}
		}
		if pid == os.Getpid() {
			names = slices.DeleteFunc(names, func(name string) bool { return name == "written" }) // the test has it, too
		}
		if fmt.Sprint(names) != "["+want+"]" {
			t.Errorf("WrittenFiles of process %d = %q, want %s", pid, files, want)
		}
		if files = inspect.WrittenFiles(processes, map[uint64]bool{st.Dev + 1: true}); len(files) > 0 {
			t.Errorf("WrittenFiles of another device = %q", files)
		}
	}
}
