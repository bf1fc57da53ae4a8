// containerd-shim-kata-v2 is the stand-in for Kata's shim. It lies in a folder
// named go or rust, and stands in for the shim that Kata builds that way.
package main

import (
	"runtime"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/shim"
)

// The first thread is what /proc shows of the process: nothing that joins other
// namespaces may run on it.
func init() { runtime.LockOSThread() }

func main() { shim.Main() }
