// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// foreignPTY opens a terminal on a file system that the caller's mount namespace
// lacks.
func foreignPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts a file system of terminals: only as root")
	}
	dir := t.TempDir()
	err := thread.Do(func() (err error) {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			return err
		}
		if err := unix.Mount("devpts", dir, "devpts", 0, "newinstance,ptmxmode=0666"); err != nil {
			return err
		}
		if master, err = os.OpenFile(filepath.Join(dir, "ptmx"), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
			return err
		}
		if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		slave, err = os.OpenFile(filepath.Join(dir, "0"), os.O_RDWR|unix.O_NOCTTY, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		master.Close()
		slave.Close()
	})
	return master, slave
}

// The terminal of an exec is known by where it is, whether or not its other end
// is open, and not taken for the container's own.
func TestTerminalsOfExecs(t *testing.T) {
	master, slave := foreignPTY(t)
	cmd := exec.Command("sh", "-c", "exec 4</dev/zero; echo ready; read line")
	cmd.ExtraFiles = []*os.File{slave}
	testproc.Ready(t, cmd)
	var st unix.Stat_t
	if err := unix.Fstat(int(slave.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	key := terminalKey(st.Rdev, st.Dev)
	for _, hungUp := range []bool{false, true} {
		if hungUp {
			master.Close()
		}
		for stdio, want := range map[string]int{"pipe:[1]": 1, key: 0} {
			c, err := Look(t.Context(), cmd.Process.Pid, []int{cmd.Process.Pid}, nil)
			if err != nil {
				t.Fatal(err)
			}
			findings := c.CheckTerminals([]*api.Stdio{{Key: stdio}})
			if len(findings) != want || want > 0 && !strings.Contains(findings[0].What, "has the exec's terminal open") {
				t.Errorf("hung up %t, stdio %s: %v", hungUp, stdio, findings)
			}
		}
	}
}

// A process of a session whose leader is an exec's cannot come back.
func TestSessionOfAnExec(t *testing.T) {
	_, slave := foreignPTY(t)
	// The leader, and a child that is the container's root for the test.
	cmd := exec.Command("sh", "-c", "exec 4<>/dev/tty; sleep 1000 & echo ready; read line; kill $!")
	cmd.ExtraFiles = []*os.File{slave}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
	testproc.Ready(t, cmd)
	leader, child := cmd.Process.Pid, children(t, cmd.Process.Pid)[0]
	c, err := Look(t.Context(), child, []int{child}, nil)
	if err != nil {
		t.Fatal(err)
	}
	check := func(want string) {
		t.Helper()
		findings := c.CheckTerminals(nil)
		switch {
		case want == "" && len(findings) > 0:
			t.Errorf("got %v", findings)
		case want != "" && (len(findings) != 1 || !strings.Contains(findings[0].What, want)):
			t.Errorf("got %v, want one with %q", findings, want)
		}
	}
	check("attached to the exec's terminal")
	c.Root.Terminal, c.Root.Session = 0, child // as after setsid(2)
	check("has the exec's terminal open")
	if c, err = Look(t.Context(), leader, []int{leader, child}, nil); err != nil {
		t.Fatal(err)
	}
	// Its leader is the container's own, and still the terminal is not.
	if findings := c.CheckTerminals(nil); len(findings) != 2 || findings[0].What != left.what {
		t.Errorf("got %v", findings)
	}
}
