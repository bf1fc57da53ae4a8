// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

// spawner starts children that the kernel kills when this process exits,
// however it exits.
//
// The kernel sends PR_SET_PDEATHSIG when the forking thread exits, and Go may
// end threads at any time: so one goroutine stays locked to a thread for the
// life of the process and starts all children.
type spawner struct {
	once  sync.Once
	calls chan func()
}

func (s *spawner) start(cmd *exec.Cmd) error {
	s.once.Do(func() {
		s.calls = make(chan func())
		go func() {
			runtime.LockOSThread()
			for call := range s.calls {
				call()
			}
		}()
	})
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	result := make(chan error)
	s.calls <- func() { result <- cmd.Start() }
	return <-result
}

// children is the spawner of the process.
var children spawner

// child is a started process with the goroutine that waits for it.
type child struct {
	cmd  *exec.Cmd
	done chan struct{} // closed once the process is reaped
	err  error         // of Wait; valid after done
}

func startChild(cmd *exec.Cmd, env []string) (*child, error) {
	cmd.Env = append(os.Environ(), env...)
	if err := children.start(cmd); err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, done: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		close(c.done)
	}()
	return c, nil
}

// kill kills the child and returns when it is reaped. It does nothing for nil.
func (c *child) kill() {
	if c == nil {
		return
	}
	_ = c.cmd.Process.Kill() // an error means that it has exited
	<-c.done
}
