// SPDX-License-Identifier: Apache-2.0

// testbed-virtiofsd replaces the Rust virtiofsd in Kata's configuration and
// executes Debian 12's C daemon. See package virtiofsd.
package main

import (
	"fmt"
	"os"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/virtiofsd"
)

func main() {
	args, err := virtiofsd.Arguments(os.Args[1:])
	if err == nil {
		// argv[0] stays: it tells which testbed the daemon belongs to.
		err = syscall.Exec(virtiofsd.Daemon, append([]string{os.Args[0]}, args...), os.Environ())
		err = fmt.Errorf("exec %s: %w", virtiofsd.Daemon, err)
	}
	fmt.Fprintln(os.Stderr, "testbed-virtiofsd:", err)
	os.Exit(1)
}
