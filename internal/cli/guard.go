// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// guardCommandName is the command of the process that resumes a container if
// the one that has paused it is killed.
const guardCommandName = "resume-after"

// resumed is what the guard is told when there is nothing left to do.
const resumed = "resumed\n"

// guard starts a process that resumes a container as soon as this one has
// ended, unless release was called before.
func (e *everyday) guard(namespace, id string) (release func(), err error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe, guardCommandName, "--address", e.address, "--config", e.config, "--namespace", namespace, id) //nolint:noctx // it outlives this process
	// What ends this process's group is not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	told, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() {
		_, _ = io.WriteString(told, resumed) // it may be dead
		_ = told.Close()
		_ = cmd.Wait()
	}, nil
}

func guardCommand() *cobra.Command {
	e := &everyday{}
	var namespace string
	c := &cobra.Command{
		Use: guardCommandName, Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
			if released(cmd.InOrStdin()) {
				return nil
			}
			n, _, err := e.node()
			if err != nil {
				return err
			}
			defer n.Close()
			return n.Resume(context.WithoutCancel(cmd.Context()), namespace, args[0])
		},
	}
	c.Flags().StringVar(&e.config, "config", "", "")
	c.Flags().StringVar(&e.address, "address", "", "")
	c.Flags().StringVar(&namespace, "namespace", "", "")
	return c
}

// released waits for the end of a guard's input, and reports whether it was
// told that the container runs.
func released(r io.Reader) bool {
	data, _ := io.ReadAll(io.LimitReader(r, int64(len(resumed)))) // what is missing says enough
	return string(data) == resumed
}
