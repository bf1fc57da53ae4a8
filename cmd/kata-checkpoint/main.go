// SPDX-License-Identifier: Apache-2.0

// Command kata-checkpoint is the operator's tool: it reports whether a node can
// checkpoint containers, and what is wrong if it cannot.
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
	status := cli.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
