package entry

import (
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/exechelper"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/first"
)

// What stands for the thread and its goroutine.
var (
	tls       [2]uintptr   //nolint:unused // entry_amd64.s uses it
	goroutine [128]uintptr //nolint:unused // entry_amd64.s uses it
)

// start is the entry point.
func start() //nolint:unused // the linker's -E names it

//nolint:unused // entry_amd64.s calls it
func help() { exit(exechelper.RunBare()) }

//nolint:unused // entry_amd64.s calls it
func spawn() { exit(enter.Serve()) }

//nolint:unused // entry_amd64.s calls it
func reap() { exit(first.Run()) }

//nolint:unused // help, spawn and reap call it
func exit(status int) {
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(status), 0, 0)
	}
}
