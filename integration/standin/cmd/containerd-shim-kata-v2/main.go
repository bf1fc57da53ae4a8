// SPDX-License-Identifier: Apache-2.0

// containerd-shim-kata-v2 is the stand-in for Kata's shim. The name of its
// directory, go or rust, selects which of Kata's two shims it imitates.
package main

import (
	"runtime"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/shim"
)

// /proc/PID shows the main thread's namespaces, so that nothing that joins
// others may run on it.
func init() { runtime.LockOSThread() }

func main() { shim.Main() }
