// SPDX-License-Identifier: Apache-2.0

// Package plugin is the containerd side of kata-checkpoint: the shim of the
// runtime io.containerd.kata-checkpoint.v2. Its only promise to importers is
// [Run]; everything behind it is internal.
package plugin

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/daemon"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/manager"
	_ "github.com/kata-checkpoint/kata-checkpoint/plugin/internal/task/register" // what the daemon serves
)

// Name is the name of the runtime.
const Name = manager.Name

// Run is one invocation of the shim by containerd. args is the command line
// without the program's name. Run writes the answers to start, delete and -info
// to stdout; without an action it serves the sandbox until that ends.
func Run(ctx context.Context, args []string, stdout io.Writer) error {
	i, err := manager.Parse(args)
	if err != nil {
		return err
	}
	return run(ctx, i, stdout)
}

func run(ctx context.Context, i *manager.Invocation, stdout io.Writer) (err error) {
	var out []byte
	switch {
	case i.Version:
		_, err = fmt.Fprintf(stdout, "containerd-shim-kata-checkpoint-v2 %s\n", version.Version)
		return err
	case i.Info:
		out, err = manager.Info(ctx, i)
	case i.Action == "start":
		// containerd reads stdout and stderr as one answer.
		log.L.Logger.SetOutput(io.Discard)
		out, err = manager.Start(ctx, i)
	case i.Action == "delete":
		out, err = manager.Delete(ctx, i)
	case i.Action == "":
		return daemon.Run(ctx, i)
	default:
		return fmt.Errorf("%w: unknown action %q", manager.ErrUsage, i.Action)
	}
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}
