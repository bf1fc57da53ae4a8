// SPDX-License-Identifier: Apache-2.0

// Command kata-checkpoint-launcher becomes CRIU in the guest; see package launch.
// The agent starts it.
package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
)

func init() {
	// The main goroutine keeps the main thread: nobody else may change its
	// namespaces.
	runtime.LockOSThread()
}

func main() {
	if len(os.Args) != 3 || os.Args[1] != "swrk" {
		fmt.Fprintln(os.Stderr, "kata-checkpoint-launcher: the agent starts it, in place of criu")
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "kata-checkpoint-launcher:", launch.Run(os.Args))
	os.Exit(1)
}
