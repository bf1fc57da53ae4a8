// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-kata-checkpoint-v2 is the shim of the runtime
// io.containerd.kata-checkpoint.v2. containerd starts it.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/plugin"
)

func main() {
	if err := plugin.Run(context.Background(), os.Args[1:], os.Stdout); err != nil {
		// containerd shows this to whoever asked for the container.
		fmt.Fprintf(os.Stderr, "%s: %s\n", plugin.Name, errcode.Text(err))
		os.Exit(1)
	}
}
