package integration

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// tcpListen: a listening socket comes back in another VM, without a word from anybody.
func tcpListen(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "relay", "-listen", "127.0.0.1:8080"}})
	first := s.run(c)
	s.waitLine(first.Output, 0, "boot ") // it listens before it prints
	ask := func(run *engine.Run, question, want string) {
		s.Helper()
		if have := s.shell(run, "echo say "+question+" | nc 127.0.0.1 8080"); len(have) != 1 || have[0] != want {
			s.Fatalf("the answer to %q is %q, not %q", question, have, want)
		}
	}
	ask(first, "here", "1 here")
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	restored := s.restore(c, dir)
	ask(restored, "there", "2 there")
	s.checkOtherVM(first, restored)
}

// tcpEstablishedRefused: an open connection is refused in one sentence, which says what to do; where the container's annotation says that
// connections are to be closed, they are, and the program hears of it.
func tcpEstablishedRefused(s *scenario) {
	w := s.connectedLink(linkPath())
	peer := s.answering(w)
	caller := engine.Container{ID: "c", Args: []string{workload.Path, "caller", "-server", peer.Addr().String()}, Network: w.namespace.Path}
	c := s.create(caller)
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Rounds, 3)
	const sentence = "has an open TCP connection from"
	s.checkRefused("an open connection", run, s.dir(), sentence, peer.Addr().String(), "kata-checkpoint.dev/tcp")
	err := s.engine.CheckpointByDefault(s.ctx, run, s.dir())
	if err == nil || !strings.Contains(err.Error(), sentence) || strings.Contains(err.Error(), "\n") {
		s.Errorf("the refusal is not one sentence: %v", err)
	}
	s.checkKeepsRunning(run)
	s.checkExitEvents(c)
	s.remove(c)
	s.recreateLink(w)

	caller.ID, caller.Annotations = "closing", map[string]string{"kata-checkpoint.dev/tcp": "close"}
	c = s.create(caller)
	run = s.run(c)
	s.waitNumbers(run.Output, workload.Rounds, 3)
	dir := s.dir()
	s.check(s.engine.CheckpointByDefault(s.ctx, run, dir))
	s.waitExit(run, 137)
	path := w.namespace.Path
	s.check(w.remove())
	s.connectedLink(path) // with another address
	restored := s.restore(c, dir)
	s.waitLine(restored.Output, 0, "the connection is lost")
	s.waitExit(restored, 1)
}

// tcpEstablished: with open_tcp and the same address, connections to the world outside of the VM go on, in the same VM and in another, and the
// peers notice nothing. Nothing is on its way when the container stops: what a peer sends again later, the new VM answers with a reset.
func tcpEstablished(s *scenario) {
	w := s.connectedLink(linkPath())
	peer := s.answering(w)
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "caller", "-server", peer.Addr().String(), "-every", "5s"}, Network: w.namespace.Path})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 2)
	s.check(s.engine.CheckpointWith(s.ctx, first, s.dir(), &runcoptions.CheckpointOptions{OpenTcp: true}))
	s.step("checkpointed %s, which goes on", c.ID())
	s.checkKeepsRunning(first)

	dir := s.dir()
	s.waitNumbers(first.Output, workload.Rounds, len(s.printedNumbers(first.Output, workload.Rounds))+1) // the next one is five seconds away
	s.check(s.engine.CheckpointWith(s.ctx, first, dir, &runcoptions.CheckpointOptions{OpenTcp: true, Exit: true}))
	s.step("checkpointed %s", c.ID())
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)
	if opened, ended := peer.connections(); opened != 1 || len(ended) > 0 {
		s.Errorf("while the container is away, the peer has had %d connections, and ends: %v", opened, ended)
	}

	s.recreateLink(w)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 3)...))
	s.checkOtherVM(first, restored)
	if opened, ended := peer.connections(); opened != 1 || len(ended) > 0 {
		s.Errorf("after the restore, the peer has had %d connections, and ends: %v", opened, ended)
	}
	s.remove(c)
}

// answering is a server on the node that sends every line back.
type answering struct {
	net.Listener
	done sync.WaitGroup

	mu     sync.Mutex
	opened []net.Conn
	ended  []error
}

// answering starts one, which ends with the scenario.
func (s *scenario) answering(w *podLink) *answering {
	s.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(w.node.String(), "0"))
	s.check(err)
	a := &answering{Listener: l}
	a.done.Go(a.accept)
	s.afterContainers(func() error {
		err := a.Close()
		a.mu.Lock()
		for _, c := range a.opened {
			err = errors.Join(err, c.Close())
		}
		a.mu.Unlock()
		a.done.Wait()
		return err
	})
	return a
}

func (a *answering) accept() {
	for {
		c, err := a.Accept()
		if err != nil {
			return // it was closed
		}
		a.mu.Lock()
		a.opened = append(a.opened, c)
		a.mu.Unlock()
		a.done.Go(func() {
			err := answerLines(c)
			a.mu.Lock()
			defer a.mu.Unlock()
			a.ended = append(a.ended, err)
		})
	}
}

func answerLines(c net.Conn) error {
	for lines := bufio.NewReader(c); ; {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return errors.New("the other end has closed it")
		}
		if err != nil {
			return err
		}
		if _, err := fmt.Fprint(c, line); err != nil {
			return err
		}
	}
}

// connections says how many there have been, and how those ended that have.
func (a *answering) connections() (opened int, ended []error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.opened), append([]error(nil), a.ended...)
}
