// SPDX-License-Identifier: Apache-2.0

// testbed-vmm is a hypervisor for Kata that implements Cloud Hypervisor's API
// with QEMU. See package vmm.
//
// Usage: testbed-vmm --api-socket PATH; --version prints a version that Kata
// accepts. Settings come from a file (vmm.LoadSettings).
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vmm"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testbed-vmm:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	socket := ""
	for i, arg := range args {
		switch {
		case arg == "--version" || arg == "-V":
			fmt.Println(vmm.Version)
			return nil
		case arg == "--api-socket" && i+1 < len(args):
			socket = args[i+1]
		case strings.HasPrefix(arg, "--api-socket="):
			socket = strings.TrimPrefix(arg, "--api-socket=")
		}
		// Kata's other arguments (log levels, seccomp, an event monitor)
		// concern only Cloud Hypervisor.
	}
	socket = strings.TrimPrefix(socket, "path=")
	if socket == "" {
		return errors.New("no --api-socket")
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own path: %w", err)
	}
	settings, err := vmm.LoadSettings(exe)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(settings.LogDir, 0o755); err != nil {
		return fmt.Errorf("log directory: %w", err)
	}
	name := filepath.Base(filepath.Dir(socket)) // both shims create a directory for each sandbox, named by its id
	logFile, err := os.OpenFile(filepath.Join(settings.LogDir, name+".vmm"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer logFile.Close()
	log.L.Logger.SetOutput(logFile)
	log.L.WithField("args", args).WithField("accel", settings.Accel).Info("vmm started")

	if err := vmm.NoteNamespace(settings.LogDir, name); err != nil {
		return err
	}
	listener, err := vmm.Listen(socket)
	if err != nil {
		return fmt.Errorf("api socket: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err = vmm.NewServer(settings, name, logFile).Serve(ctx, listener)
	log.L.WithError(err).Info("vmm stopped")
	return err
}
