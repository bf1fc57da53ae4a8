// Command containerd-shim-kata-checkpoint-v2 is the shim of the runtime
// io.containerd.kata-checkpoint.v2. containerd starts it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/daemon"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/manager"
	_ "github.com/kata-checkpoint/kata-checkpoint/plugin/task/register"
)

func main() {
	i, err := manager.Parse(os.Args[1:])
	if err == nil {
		err = run(context.Background(), i)
	}
	if err != nil {
		// containerd shows this to whoever asked for the container.
		fmt.Fprintf(os.Stderr, "%s: %v\n", manager.Name, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, i *manager.Invocation) (err error) {
	var out []byte
	switch {
	case i.Version:
		_, err = fmt.Printf("containerd-shim-kata-checkpoint-v2 %s\n", version.Version)
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
		return fmt.Errorf("%w: %q is none of its actions", manager.ErrUsage, i.Action)
	}
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(out)
	return err
}
