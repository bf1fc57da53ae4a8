// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/containerd/log"
	"github.com/mdlayher/vsock"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
)

var shells = []string{"/bin/bash", "/bin/sh"}

// serveConsole serves each connection a shell on a terminal, in the guest's
// root.
func serveConsole(r *reaper) error {
	shell := ""
	for _, s := range shells {
		if _, err := os.Stat(s); err == nil {
			shell = s
			break
		}
	}
	if shell == "" {
		return errors.New("debug console: no shell")
	}
	l, err := vsock.ListenContextID(anyCID, api.DebugConsolePort, nil)
	if err != nil {
		return fmt.Errorf("debug console: %w", err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				log.L.WithError(err).Error("debug console failed")
				return
			}
			go func() {
				defer c.Close()
				if err := runShell(r, shell, c); err != nil {
					log.L.WithError(err).Error("debug console failed")
				}
			}()
		}
	}()
	return nil
}

// runShell returns when the shell exits, and kills it if the peer hangs up.
func runShell(r *reaper, shell string, c net.Conn) error {
	ours, theirs, err := newTerminal(0)
	if err != nil {
		return err
	}
	defer ours.close()
	cmd := exec.Command(shell)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TERM=dumb")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs.stdio[0], theirs.stdio[1], theirs.stdio[2]
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	status, err := r.start(cmd)
	theirs.close()
	if err != nil {
		return err
	}
	output := make(chan struct{})
	go func() {
		defer close(output)
		_, _ = io.Copy(c, ours.terminal)
	}()
	go func() {
		_, _ = io.Copy(ours.terminal, c)
		// The shell's session loses the terminal; background processes with
		// streams of their own survive.
		_ = syscall.Kill(cmd.Process.Pid, syscall.SIGKILL)
	}()
	<-status
	ours.drain()
	<-output
	return nil
}
