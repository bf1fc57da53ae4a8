package vmm

import (
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

// spawner starts children that the kernel kills when this process ends, however
// it ends.
//
// The kernel ties PR_SET_PDEATHSIG to the thread that forked, and Go ends
// threads when it likes: so one goroutine keeps a thread for itself until the
// process ends, and all children come from there.
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

// children is the one spawner of the process.
var children spawner

// child is a started process with the one goroutine that waits for it.
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

// kill ends the child and returns when it is reaped. A nil child is none.
func (c *child) kill() {
	if c == nil {
		return
	}
	_ = c.cmd.Process.Kill() // an error means that it has ended
	<-c.done
}
