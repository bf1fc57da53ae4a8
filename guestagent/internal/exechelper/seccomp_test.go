// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"os"
	"os/exec"
	"reflect"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// The filters of a process are read as they were set, in that order, and the
// process continues.
func TestFilters(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to read seccomp filters")
	}
	fail := func(call uint32) []unix.SockFilter {
		return []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the call's number
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
	}
	for name, want := range map[string][][]unix.SockFilter{
		"none": nil,
		"two":  {fail(unix.SYS_REBOOT), fail(unix.SYS_SWAPON)},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("cat")
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			// A process inherits the filters of the thread that starts it.
			err = thread.Do(func() error {
				for _, f := range want {
					program := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
					if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
						return errno
					}
				}
				return cmd.Start()
			})
			if err != nil {
				t.Fatal(err)
			}
			h := &Helper{pid: cmd.Process.Pid}
			got, err := h.Filters()
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("the filters are %v (%v), not %v", got, err, want)
			}
			stdin.Close()
			if err := cmd.Wait(); err != nil {
				t.Errorf("the process: %v", err)
			}
		})
	}
}
