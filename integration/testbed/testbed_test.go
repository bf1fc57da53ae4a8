// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseMount(t *testing.T) {
	for _, tc := range []struct {
		line string
		want mount
		ok   bool
	}{
		{"36 35 98:0 / / rw,noatime - ext4 /dev/root rw", mount{path: "/"}, true},
		{"36 35 98:0 /mnt1 /mnt2 rw shared:7 - ext4 /dev/root rw", mount{path: "/mnt2", shared: true}, true},
		{"36 35 98:0 /a /b rw shared:7 master:1 - ext4 /dev/root rw", mount{path: "/b", shared: true, slave: true}, true},
		{`36 35 98:0 / /with\040space rw master:1 propagate_from:2 - ext4 /dev/root rw`, mount{path: "/with space", slave: true}, true},
		{"garbage", mount{}, false},
		{"1 2 3 - ext4", mount{}, false},
	} {
		if got, ok := parseMount(tc.line); got != tc.want || ok != tc.ok {
			t.Errorf("parseMount(%q) = %+v, %v, want %+v, %v", tc.line, got, ok, tc.want, tc.ok)
		}
	}
}

// A console is a shell on a socket here, as the stand-in's agent has it; the
// guest's pid 1 gives it a terminal, which script(1) does here.
func TestConsoleExec(t *testing.T) {
	for _, console := range []struct {
		name    string
		command []string
	}{
		{"plain", []string{"bash"}},
		{"terminal", []string{"script", "-qec", "bash -i", "/dev/null"}},
	} {
		for _, tc := range []struct {
			name, script, want string
			status             int
		}{
			{"output and success", "echo one; echo two >&2", "one\ntwo\n", 0},
			{"a status", "printf partial; exit 7", "partial", 7},
			{"no output", "false", "", 1},
			{"stdin is empty", "cat; echo end", "end\n", 0},
			{"bytes stay as they are", `printf 'a\r\n\tb\001\n'`, "a\r\n\tb\001\n", 0},
			{"quotes", Command("printf", "%s|", "it's", "", "$HOME", "a b"), "it's||$HOME|a b|", 0},
			{"much", "head -c 300000 /dev/zero | tr '\\0' x", strings.Repeat("x", 300000), 0},
			{"a long script", "# " + strings.Repeat("long ", 5000) + "\necho done", "done\n", 0},
		} {
			t.Run(console.name+"/"+tc.name, func(t *testing.T) {
				if _, err := exec.LookPath(console.command[0]); err != nil {
					t.Skip(err)
				}
				conn := shellOn(t, console.command)
				output, status, err := consoleExec(conn, tc.script)
				if err != nil {
					t.Fatalf("%v after %q", err, output)
				}
				if string(output) != tc.want || status != tc.status {
					t.Errorf("got %.200q, %d, want %.200q, %d", output, status, tc.want, tc.status)
				}
			})
		}
	}
}

func TestConsoleExecWithoutAShell(t *testing.T) {
	if _, _, err := consoleExec(shellOn(t, []string{"true"}), "echo"); err == nil {
		t.Error("no error")
	}
}

// shellOn runs a command with a socket as its stdio.
func shellOn(t *testing.T, command []string) net.Conn {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	t.Cleanup(func() {
		conn.Close()
		_ = cmd.Wait() // the console's end kills the shell
	})
	if err := conn.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestDialGuestReadsNotMoreThanTheAnswer(t *testing.T) {
	// The socket's path is Kata's; only the handshake is looked at here.
	client, server := net.Pipe()
	defer client.Close()
	go func() {
		line, _ := bufio.NewReader(server).ReadString('\n')
		_, _ = io.WriteString(server, strings.Replace(line, "CONNECT", "OK", 1)+"first bytes")
		server.Close()
	}()
	if err := handshake(client, 10750); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(client); string(rest) != "first bytes" {
		t.Errorf("after the handshake: %q, %v", rest, err)
	}
}

func TestProcessesAreTheTestbeds(t *testing.T) {
	dir := t.TempDir()
	tb := &Testbed{Dir: dir}
	other := &Testbed{Dir: filepath.Join(dir, "other")}
	run := filepath.Join(dir, "run/bundle")
	if err := os.MkdirAll(run, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		setup func(*exec.Cmd)
		owned bool
	}{
		{"anybody's", func(*exec.Cmd) {}, false},
		{"marked", func(c *exec.Cmd) { c.Env = append(os.Environ(), ownerEnv+"="+dir) }, true},
		{"named", func(c *exec.Cmd) { c.Args[0] = dir + "/bin/testbed-virtiofsd" }, true},
		{"in a bundle", func(c *exec.Cmd) { c.Dir = run }, true},
		{"a user's shell in the directory", func(c *exec.Cmd) { c.Dir = dir }, false},
		{"a user's pager", func(c *exec.Cmd) { c.Args = append(c.Args, dir+"/log/containerd") }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.Command("sleep", "30")
			if tc.name == "a user's pager" {
				cmd = exec.Command("sh", "-c", "sleep 30; :", "pager")
			}
			tc.setup(cmd)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}()
			// Start returns a moment before the kernel shows the new program's
			// arguments.
			for deadline := time.Now().Add(hang); time.Now().Before(deadline); {
				if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid)); len(cmdline) > 0 {
					break
				}
			}
			if got := tb.owns(cmd.Process.Pid); got != tc.owned {
				t.Errorf("owned: %v, want %v", got, tc.owned)
			}
			if other.owns(cmd.Process.Pid) {
				t.Error("another testbed's, too")
			}
		})
	}
}

func TestAProcessIsKnownByItsStart(t *testing.T) {
	p, err := processOf(os.Getpid())
	if err != nil || !p.alive() {
		t.Fatalf("this process: %+v, %v", p, err)
	}
	p.Start += "0"
	if p.alive() {
		t.Error("another process with the same id is taken for it")
	}
	if (process{}).alive() {
		t.Error("no process is alive")
	}
}

func TestUpTakesNobodysDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := claim(t.Context(), dir); err == nil {
		t.Error("taken")
	}
	if _, err := Open(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "precious")); err != nil {
		t.Error(err)
	}
}
