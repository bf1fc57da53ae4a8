// SPDX-License-Identifier: Apache-2.0

// Package guestagent is the guest's side of kata-checkpoint in one binary. Its
// only promise to importers is [Main]; everything behind it is internal.
package guestagent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/agent"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/placeholder"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// Main runs the agent's binary and returns its exit status. What the binary is
// depends on how it is started, that is, on args: the prestart hook of Kata's
// guest (by its name), the daemon, the placeholder of a restored container, or, on
// a host, the bundle's CRIU (by its name). It is called on the main thread, which
// the caller has locked.
func Main(args []string) int {
	name := filepath.Base(args[0])
	mode := ""
	if len(args) > 1 {
		mode = args[1]
	}
	var err error
	switch {
	case name == "criu":
		err = criu.Host(args)
	case strings.HasSuffix(name, "-hook"):
		err = withExecutable(func(path string) error { return agent.Hook(path, os.Stdin) })
	case mode == agent.DaemonMode:
		err = withExecutable(func(path string) error { return agent.Daemon(context.Background(), path) })
	case mode == api.PlaceholderMode:
		return placeholder.Run()
	case mode == "--version":
		fmt.Println("kata-checkpoint-agent", version.Version)
	default:
		err = errcode.Usage.Errorf("usage: %s %s | --version (the guest hook starts it: see docs/guest.md)", name, agent.DaemonMode)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kata-checkpoint-agent:", errcode.Text(err))
		return 1
	}
	return 0
}

func withExecutable(f func(string) error) error {
	path, err := os.Executable()
	if err != nil {
		return err
	}
	return f(path)
}
