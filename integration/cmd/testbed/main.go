// SPDX-License-Identifier: Apache-2.0

// testbed creates and removes testbeds: a containerd and a Kata that run in a
// directory and need no KVM. See package testbed.
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

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

const usage = `usage:
  testbed build                 compile and pack everything that a testbed needs
  testbed build-kubelet         build the kubelet for the scenario kubelet-checkpoint-api
  testbed build-docker          build docker and dockerd for the scenario docker-life
  testbed up --dir DIR [...]    start a testbed and print its environment for a shell (testbed up -h: options)
  testbed down --dir DIR        kill everything that runs in it and remove it
  testbed shell --dir DIR SANDBOX_ID -- COMMAND [ARGUMENT...]
                                run a command in the guest's root; exits with its status`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	log.L.Logger.SetOutput(os.Stderr)
	status, err := run(ctx, os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testbed:", err)
		status = 1
	}
	os.Exit(status)
}

func run(ctx context.Context, args []string) (status int, err error) {
	if len(args) == 0 {
		return 2, errors.New(usage)
	}
	switch verb, args := args[0], args[1:]; verb {
	case "build":
		return 0, build(ctx)
	case "build-kubelet":
		return 0, buildKubelet(ctx)
	case "build-docker":
		return 0, buildDocker(ctx)
	case "up":
		return 0, up(ctx, args)
	case "down":
		t, _, err := open("down", args)
		if err != nil {
			return 1, err
		}
		return 0, t.Down(ctx)
	case "shell":
		return shell(ctx, args)
	}
	return 2, errors.New(usage)
}

// build builds all parts that do not depend on the agent, so that the first
// `testbed up` is as fast as the second.
func build(ctx context.Context) error {
	p, err := parts.Find()
	if err != nil {
		return err
	}
	if err := p.InstallHostPackages(ctx); err != nil {
		return err
	}
	containerd := func(ctx context.Context) (string, error) { return p.Containerd(ctx, parts.ContainerdVersion) }
	for _, part := range []func(context.Context) (string, error){p.VhostDeviceVsock, p.Image, p.StandinBase, p.KataBase, containerd} {
		path, err := part(ctx)
		if err != nil {
			return err
		}
		fmt.Println(path)
	}
	return nil
}

func buildKubelet(ctx context.Context) error {
	p, err := parts.Find()
	if err != nil {
		return err
	}
	path, err := p.Kubelet(ctx)
	if err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}

func buildDocker(ctx context.Context) error {
	p, err := parts.Find()
	if err != nil {
		return err
	}
	client, daemon, err := p.Docker(ctx)
	if err != nil {
		return err
	}
	fmt.Println(client)
	fmt.Println(daemon)
	return nil
}

func up(ctx context.Context, args []string) error {
	var o testbed.Options
	flags := flag.NewFlagSet("testbed up", flag.ContinueOnError)
	flags.StringVar(&o.Dir, "dir", "", "`directory` to create")
	flags.StringVar(&o.Kata, "kata", "", "`directory` with a real Kata (containerd-shim-kata-v2, configuration.toml, kata-agent) instead of the stand-in")
	flags.StringVar((*string)(&o.Way), "way", "", "which Kata the stand-in imitates: go (default) or rust (`way`)")
	flags.StringVar(&o.GuestMounts, "guest-mounts", "", "propagation of the guest's mounts: shared (default) or private")
	flags.StringVar(&o.Accel, "accel", "", "kvm or tcg; by default what a probe has found")
	flags.BoolVar(&o.NoNetwork, "no-network", false, "no network for sandboxes: faster where no CNI gives them one")
	flags.BoolVar(&o.CRI, "cri", false, "also serve the CRI: pods with CNI and the NRI plugin, for crictl")
	flags.BoolVar(&o.NoAgent, "no-agent", false, "do not configure the guest bundle in Kata")
	flags.StringVar(&o.Containerd, "containerd", "", "containerd's `release`: 2.1, 2.2, 2.3 or 2.4 (default)")
	flags.StringVar(&o.GuestBundle, "guest-bundle", "", "guest bundle's `directory` (default build/guest-bundle)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	t, err := testbed.Up(ctx, o)
	if err != nil {
		return err
	}
	fmt.Print(t.Env())
	return nil
}

// open finds the testbed that --dir names, or else TESTBED_DIR.
func open(verb string, args []string) (*testbed.Testbed, []string, error) {
	flags := flag.NewFlagSet("testbed "+verb, flag.ContinueOnError)
	dir := flags.String("dir", os.Getenv("TESTBED_DIR"), "the testbed's `directory`")
	if err := flags.Parse(args); err != nil {
		return nil, nil, err
	}
	if *dir == "" {
		return nil, nil, errors.New("no --dir")
	}
	t, err := testbed.Open(*dir)
	return t, flags.Args(), err
}

func shell(ctx context.Context, args []string) (int, error) {
	t, args, err := open("shell", args)
	if err != nil {
		return 1, err
	}
	if len(args) < 2 {
		return 2, errors.New(usage)
	}
	id, command := args[0], args[1:]
	if command[0] == "--" {
		command = command[1:]
	}
	output, status, err := t.GuestExec(ctx, id, testbed.Command(command...))
	os.Stdout.Write(output)
	return status, err
}
