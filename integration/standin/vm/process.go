// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/containerd/log"
)

// process is a child with any number of waiters.
type process struct {
	name string
	cmd  *exec.Cmd
	gone chan struct{}
}

// start starts a child in its own process group, without stdin, and logs its
// output.
func start(cmd *exec.Cmd) (*process, error) {
	// Not os/exec's pipe: Wait would block while any grandchild keeps it open.
	output, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		output.Close()
		return nil, err
	}
	p := &process{name: cmd.Path, cmd: cmd, gone: make(chan struct{})}
	go func() {
		defer output.Close()
		logLines(p.name, output)
	}()
	go func() {
		defer close(p.gone)
		err := cmd.Wait()
		log.L.WithField("program", p.name).WithField("pid", cmd.Process.Pid).WithError(err).Info("process exited")
	}()
	return p, nil
}

func logLines(name string, r io.Reader) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		log.L.WithField("program", name).Info(lines.Text())
	}
	_, _ = io.Copy(io.Discard, r) // after a line beyond the scanner's limit
}

// end waits for the child, and kills its process group after a timeout.
func (p *process) end(patience time.Duration) {
	select {
	case <-p.gone:
		return
	case <-time.After(patience):
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.gone
}
