// SPDX-License-Identifier: Apache-2.0

// Command kata-checkpoint-agent is the guest side of kata-checkpoint in one
// binary; see [guestagent.Main] for its modes.
package main

import (
	"os"
	"runtime"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent"
)

func init() {
	// The main goroutine keeps the main thread: nobody else may change its
	// namespaces.
	runtime.LockOSThread()
}

func main() {
	os.Exit(guestagent.Main(os.Args))
}
