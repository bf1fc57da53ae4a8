// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

func TestWriteOutFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, path + " that is gone"} {
		if err := writeOutFile(t.Context(), inspect.WrittenFile{FD: -1, Link: path}); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// A lease is broken by whoever opens the file, even by the agent.
func TestWriteOutBreaksNoLease(t *testing.T) {
	fd, err := unix.Open(filepath.Join(t.TempDir(), "leased"), unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatal(err)
	}
	file := inspect.WrittenFile{PID: os.Getpid(), FD: fd, Link: fmt.Sprintf("/proc/self/fd/%d", fd)}
	if err := writeOutFile(t.Context(), file); err != nil {
		t.Error(err)
	}
	if lease, err := unix.FcntlInt(uintptr(fd), unix.F_GETLEASE, 0); err != nil || lease != unix.F_WRLCK {
		t.Errorf("after writing the file out, the lease on it is %d, %v; want %d", lease, err, unix.F_WRLCK)
	}
}
