// SPDX-License-Identifier: Apache-2.0

// standin-agent is the stand-in for Kata's agent: /usr/bin/kata-agent in the
// guest, executed by /init as PID 1. With an argument it is one of its own
// helpers.
package main

import (
	"context"
	"os"
	"runtime"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/guest"
)

// /proc/PID shows the main thread's namespaces, so that nothing that joins
// others may run on it.
func init() { runtime.LockOSThread() }

func main() {
	log.L.Logger.SetOutput(os.Stdout)
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case guest.HookMode:
			guest.RunHook(os.Args[2:])
			return
		case guest.ExecMode:
			guest.Exec()
			return
		case guest.TerminalMode:
			if err := guest.TakeTerminal(os.Args[2:]); err != nil {
				log.L.Fatal(err)
			}
			return
		}
		log.L.Fatalf("unknown mode %q", os.Args[1])
	}
	if err := os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
		log.L.Fatal(err)
	}
	if err := guest.Boot(); err != nil {
		log.L.Fatal(err)
	}
	log.L.Fatal(guest.Serve(context.Background()))
}
