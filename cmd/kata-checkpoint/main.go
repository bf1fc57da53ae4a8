// SPDX-License-Identifier: Apache-2.0

// Command kata-checkpoint is the operator's tool: it makes and restores
// checkpoints, installs what that needs on a node, and reports what is wrong with
// one. By the name kubectl-kata_checkpoint it is a plugin of kubectl.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	status := cli.Main(ctx, os.Args, os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
