// kata-checkpoint-agent is the guest's side of kata-checkpoint in one binary.
// What it is depends on how it is started: the prestart hook of Kata's guest
// (by its name), the daemon, the placeholder of a restored container, the exec
// helper in one, the spawner that forks execs, the first process of a pid
// namespace, the launcher that becomes CRIU, or, on a host, the bundle's CRIU
// (by its name).
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/enter"
	_ "github.com/kata-checkpoint/kata-checkpoint/guestagent/entry" // where it starts, see the Makefile
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/exechelper"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/first"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/placeholder"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

func init() {
	// The main goroutine keeps the main thread: the launcher passes that thread's
	// namespaces on by execve, and nobody else may change them.
	runtime.LockOSThread()
}

func main() {
	name := filepath.Base(os.Args[0])
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	var err error
	switch {
	case criu.IsLaunch(os.Args) && criu.IsOp(os.Args[0]):
		err = criu.Launch(os.Args)
	case name == "criu":
		err = criu.Host(os.Args)
	case strings.HasSuffix(name, "-hook"):
		err = withExecutable(func(path string) error { return guestagent.Hook(path, os.Stdin) })
	case mode == guestagent.DaemonMode:
		err = withExecutable(func(path string) error { return guestagent.Daemon(context.Background(), path) })
	case mode == guestagent.PlaceholderMode:
		os.Exit(placeholder.Run())
	case mode == guestagent.ExecMode && len(os.Args) == 3:
		os.Exit(exechelper.Run())
	case mode == guestagent.SpawnMode:
		os.Exit(enter.Serve())
	case mode == guestagent.FirstMode && len(os.Args) == 2:
		os.Exit(first.Run())
	case mode == "--version":
		fmt.Println("kata-checkpoint-agent", version.Version)
	default:
		err = fmt.Errorf("usage: %s %s | --version (the guest hook starts it: see docs/guest.md)", name, guestagent.DaemonMode)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kata-checkpoint-agent:", err)
		os.Exit(1)
	}
}

func withExecutable(f func(string) error) error {
	path, err := os.Executable()
	if err != nil {
		return err
	}
	return f(path)
}
