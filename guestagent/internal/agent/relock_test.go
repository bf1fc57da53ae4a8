// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	file_lock "github.com/checkpoint-restore/go-criu/v7/crit/images/file-lock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
)

// A process that has lost its locks has them again, is frozen as before, and does
// not notice.
func TestRelockFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	cmd := exec.Command("sh", "-c", `trap 'echo signal' USR1; exec 5<>"$0"; echo ready; until read line; do :; done; echo "$line"`, file)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		_ = cmd.Wait()
	}()
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "ready\n" {
		t.Fatal(line, err)
	}
	pid := cmd.Process.Pid
	_, c := adopted(t, pid)
	c.Restored = &c.Init
	if err := os.Mkdir(c.tree(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := cgroup.Move(pid, c.tree()); err != nil {
		t.Fatal(err)
	}
	if err := cgroup.Freeze(t.Context(), c.tree()); err != nil {
		t.Fatal(err)
	}
	// One that is pending must not get in the way.
	if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	images := t.TempDir()
	image := entriesImage{magic: []byte{0x19, 0x43, 0x56, 0x54, 0x16, 0x36, 0x32, 0x54}}
	for _, l := range []*file_lock.FileLockEntry{
		{Flag: proto.Uint32(posixLock), Type: proto.Uint32(unix.F_WRLCK), Start: proto.Int64(120), Len: proto.Int64(1)},
		{Flag: proto.Uint32(posixLock), Type: proto.Uint32(unix.F_RDLCK), Start: proto.Int64(1 << 40), Len: proto.Int64(0)},
		{Flag: proto.Uint32(2), Type: proto.Uint32(unix.F_WRLCK), Start: proto.Int64(0), Len: proto.Int64(0)}, // of flock, which is not lost
	} {
		l.Pid, l.Fd = proto.Int32(int32(pid)), proto.Int32(5)
		data, err := proto.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		image.entries = append(image.entries, data)
	}
	if err := image.write(filepath.Join(images, locksImage)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// locked is the process that has a lock in the way of one.
	locked := func(start int64) int {
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: start, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l); err != nil {
			t.Fatal(err)
		}
		if l.Type == unix.F_UNLCK {
			return 0
		}
		return int(l.Pid)
	}
	if locked(120) != 0 {
		t.Fatal("there is a lock already")
	}
	for range 2 { // the second time there is nothing to do
		if err := relockFiles(t.Context(), c, images, c.tree()); err != nil {
			t.Fatal(err)
		}
	}
	for start, want := range map[int64]int{0: 0, 119: 0, 120: pid, 121: 0, 1 << 40: pid, 1<<41 + 7: pid} {
		if have := locked(start); have != want {
			t.Errorf("byte %d is locked by %d, not %d", start, have, want)
		}
	}
	if !isFrozen(t, c) {
		t.Error("it is not frozen")
	}
	if _, err := os.Stat(filepath.Join(c.Cgroup, relockCgroup)); !os.IsNotExist(err) {
		t.Errorf("a cgroup is left: %v", err)
	}
	if err := cgroup.Thaw(c.tree()); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"signal\n", "hello\n"} {
		if line, err := lines.ReadString('\n'); line != want {
			t.Errorf("it prints %q, not %q (%v)", line, want, err)
		}
	}
}
