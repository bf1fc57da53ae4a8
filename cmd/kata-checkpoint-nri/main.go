// SPDX-License-Identifier: Apache-2.0

// Command kata-checkpoint-nri is the NRI plugin. containerd starts it from its
// plugin directory, or it runs as a service and connects to containerd.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
	"github.com/kata-checkpoint/kata-checkpoint/nri"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		log.L.Error("failed to run the NRI plugin: " + errcode.Text(err))
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var o nri.Options
	flags := flag.NewFlagSet("kata-checkpoint-nri", flag.ContinueOnError)
	path := flags.String("config", config.Path(), "kata-checkpoint's configuration, the file that the shim reads")
	flags.StringVar(&o.Index, "idx", "", "index to register with, two digits (default: that of the executable's name, NN-NAME)")
	flags.StringVar(&o.Name, "name", "", "name to register with (default: that of the executable)")
	flags.StringVar(&o.Socket, "socket", "", "NRI's socket (default /var/run/nri/nri.sock)")
	showVersion := flags.Bool("version", false, "print the version")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if *showVersion {
		_, err := fmt.Println("kata-checkpoint-nri", version.Version)
		return err
	}
	cfg, err := config.Load(*path)
	if err != nil {
		return err
	}
	return nri.New(cfg).Serve(ctx, o)
}
