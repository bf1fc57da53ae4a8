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

// process is a child that may be waited for by many.
type process struct {
	name string
	cmd  *exec.Cmd
	gone chan struct{}
}

// start starts a child in a process group of its own, with nothing on stdin,
// and writes what it says to the log.
func start(cmd *exec.Cmd) (*process, error) {
	// A pipe of our own: exec's would make the wait last as long as any
	// grandchild keeps it open.
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
		log.L.WithField("program", p.name).WithField("pid", cmd.Process.Pid).Infof("ended: %v", err)
	}()
	return p, nil
}

func logLines(name string, r io.Reader) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		log.L.WithField("program", name).Info(lines.Text())
	}
	_, _ = io.Copy(io.Discard, r) // a line beyond the scanner's limit
}

// end waits for the child, and kills it with its group when it takes too long.
func (p *process) end(patience time.Duration) {
	select {
	case <-p.gone:
		return
	case <-time.After(patience):
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.gone
}
