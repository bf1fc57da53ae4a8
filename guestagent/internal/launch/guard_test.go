// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// A process that is traced gets its signals, can be stopped and continued, and
// still has all it has when its end is announced, also where it is killed.
func TestTrace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("ptrace(2) may be reserved to root")
	}
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	lines := bufio.NewReader(out)
	expect := func(want string) {
		t.Helper()
		if line, err := lines.ReadString('\n'); err != nil || line != want+"\n" {
			t.Fatalf("it prints %q (%v), not %q", line, err, want)
		}
	}
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		end  syscall.Signal
		want string
	}{
		"killed": {syscall.SIGKILL, "killed"},
		"exited": {syscall.SIGTERM, "5"},
	} {
		t.Run(name, func(t *testing.T) {
			pids := make(chan int, 1)
			ended := make(chan string, 1)
			go func() {
				err := thread.Do(func() error {
					pid, err := syscall.ForkExec(shell, []string{"sh", "-c", `trap "echo got" USR1; trap "exit 5" TERM; trap "echo back" CONT; echo ready; while :; do sleep 0.05; done`},
						&syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, in.Fd(), 2}})
					if err != nil {
						return err
					}
					pids <- pid
					announced := 0
					ws, err := trace(pid, func() {
						announced++
						if st, err := procfs.ReadStat(pid); err != nil || st.Exited() {
							t.Errorf("at its end its state is %c, %v", st.State, err)
						}
						if link, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/fd/1"); err != nil {
							t.Errorf("at its end its stdout is %q, %v", link, err)
						}
					})
					if announced != 1 {
						t.Errorf("its end was announced %d times", announced)
					}
					if ws.Signaled() {
						ended <- ws.Signal().String()
					} else {
						ended <- strconv.Itoa(ws.ExitStatus())
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}()
			pid := <-pids
			expect("ready")
			for _, sig := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGSTOP, syscall.SIGCONT, tc.end} {
				if err := unix.Kill(pid, sig); err != nil {
					t.Fatal(err)
				}
				switch sig {
				case syscall.SIGUSR1:
					expect("got")
				case syscall.SIGSTOP:
					for st, err := procfs.ReadStat(pid); st.State != 't' && st.State != 'T'; st, err = procfs.ReadStat(pid) {
						if err != nil {
							t.Fatal(err)
						}
					}
				case syscall.SIGCONT:
					expect("back")
				}
			}
			if got := <-ended; got != tc.want {
				t.Errorf("it has ended with %s, not %s", got, tc.want)
			}
		})
	}
}
