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
	"github.com/kata-checkpoint/kata-checkpoint/internal/exporter"
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
	address := flags.String("metrics-address", "", "where to serve /metrics, HOST:PORT or unix:PATH (default: metrics_address in the configuration)")
	metricsOnly := flags.Bool("metrics-only", false, "serve /metrics, and do not connect to NRI")
	showVersion := flags.Bool("version", false, "print the version")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return errcode.Usage.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if *showVersion {
		_, err := fmt.Println("kata-checkpoint-nri", version.Version)
		return err
	}
	cfg, err := config.Load(*path)
	if err != nil {
		return err
	}
	if *address != "" {
		cfg.MetricsAddress = *address
	}
	if *metricsOnly {
		if cfg.MetricsAddress == "" {
			return errcode.Usage.Errorf("--metrics-only needs --metrics-address, or metrics_address in %s", *path)
		}
		return exporter.New(cfg).Serve(ctx, cfg.MetricsAddress)
	}
	if cfg.MetricsAddress != "" {
		served := make(chan struct{})
		ctx, stop := context.WithCancel(ctx)
		defer func() { stop(); <-served }()
		go func() {
			defer close(served)
			// Without figures the plugin is as good.
			if err := exporter.New(cfg).Serve(ctx, cfg.MetricsAddress); err != nil {
				log.L.Error("no metrics are served: " + errcode.Text(err))
			}
		}()
	}
	return nri.New(cfg).Serve(ctx, o)
}
