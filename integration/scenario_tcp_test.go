// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// tcpListen: a listening socket comes back in another VM, without a word from
// anybody.
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

// tcpEstablishedRefused: an open connection is refused in one sentence, which
// says what to do; where the container's annotation says that connections are
// to be closed, they are, and the program hears of it.
func tcpEstablishedRefused(s *scenario) {
	w := s.connectedLink(linkPath())
	peer := s.answering(w)
	caller := engine.Container{ID: "c", Args: []string{workload.Path, "caller", "-server", peer.Addr().String()}, Network: w.namespace.Path}
	c := s.create(caller)
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Rounds, 3)
	const sentence = "has an open TCP connection from"
	s.checkRefused("an open connection", run, s.newDir(), sentence, peer.Addr().String(), "kata-checkpoint.dev/tcp")
	err := s.engine.CheckpointByDefault(s.ctx, run, s.newDir())
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
	dir := s.newDir()
	s.check(s.engine.CheckpointByDefault(s.ctx, run, dir))
	s.waitExit(run, 137)
	path := w.namespace.Path
	s.check(w.remove())
	s.connectedLink(path) // with another address
	restored := s.restore(c, dir)
	s.waitLine(restored.Output, 0, "the connection is lost")
	s.waitExit(restored, 1)
}

// tcpEstablished: with open_tcp and the same address, connections to the world
// outside of the VM stay open, in the same VM and in another, and the peers
// notice nothing. There is traffic both ways all the time, and the peer keeps
// sending while the container is away: nobody who does not have the connection
// may answer.
func tcpEstablished(s *scenario) {
	w := s.connectedLink(linkPath())
	peer := s.pushing(w)
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "caller", "-server", peer.Addr().String()}, Network: w.namespace.Path})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 2)
	s.check(s.engine.CheckpointWith(s.ctx, first, s.newDir(), &runcoptions.CheckpointOptions{OpenTcp: true}))
	s.step("checkpointed %s, which keeps running", c.ID())
	s.checkKeepsRunning(first)

	dir := s.newDir()
	s.check(s.engine.CheckpointWith(s.ctx, first, dir, &runcoptions.CheckpointOptions{OpenTcp: true, Exit: true}))
	s.step("checkpointed %s", c.ID())
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)
	stillOpen := func(when string) {
		s.Helper()
		if opened, ended := peer.connections(); opened != 1 || len(ended) > 0 {
			s.Fatalf("%s, the peer has had %d connections, and ends: %v", when, opened, ended)
		}
	}
	stillOpen("while the container is away")

	// The namespace that it comes back into is the one that it has left, with
	// what kata-checkpoint has put there.
	s.check(w.reconnect())
	sent := peer.pushed.Load()
	restored := s.restore(c, dir)
	stillOpen("after the restore")
	// Each round verifies all that the peer has sent before its answer.
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 3)...))
	s.step("%s continues, with %d messages that the peer has sent meanwhile", c.ID(), peer.pushed.Load()-sent)
	s.checkOtherVM(first, restored)
	stillOpen("after a while")
	s.remove(c)
}

// tcpProbed: a checkpoint does not depend on when a probe comes, which connects
// and closes the connection, as those of Kubernetes do.
func tcpProbed(s *scenario) {
	w := s.connectedLink(linkPath())
	c := s.create(engine.Container{ID: "c", Args: relay, Network: w.namespace.Path})
	run := s.run(c)
	s.waitLine(run.Output, 0, "boot ") // it listens before it prints
	address := net.JoinHostPort(w.pod.String(), relayPort)
	stop := make(chan struct{})
	probes, failures := 0, []error(nil)
	var prober sync.WaitGroup
	prober.Go(func() {
		// More often than once a second, so that few checkpoints find many.
		for ticker := time.NewTicker(100 * time.Millisecond); ; probes++ {
			select {
			case <-stop:
				ticker.Stop()
				return
			case <-ticker.C:
			}
			conn, err := net.DialTimeout("tcp", address, paced(answerTimeout))
			if err == nil {
				err = conn.Close()
			}
			if err != nil {
				failures = append(failures, err)
			}
		}
	})
	dir := ""
	for range 10 {
		dir = s.newDir()
		if err := s.engine.CheckpointTo(s.ctx, run, dir, false); err != nil {
			s.Errorf("a checkpoint of a container that is probed: %v", err)
		}
	}
	close(stop)
	prober.Wait()
	s.step("10 checkpoints with %d probes", probes)
	if len(failures) > 0 {
		s.Errorf("%d probes of %d have failed: %v", len(failures), probes, errors.Join(failures...))
	}
	s.checkAnswer(address, "say here", "1 here")
	s.check(s.engine.EndTask(s.ctx, c))
	path := w.namespace.Path
	s.check(w.remove())
	w = s.connectedLink(path) // with another address
	s.restore(c, dir)
	s.checkAnswer(net.JoinHostPort(w.pod.String(), relayPort), "say there", "1 there")
}

// tcpInside: connections with both ends in the container come back in another
// VM without a word from anybody, by IPv4 and IPv6, those that are half closed
// and full of data as well, and one that waits in a backlog is no obstacle.
func tcpInside(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "counter", "-loopback"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 2)
	dir := s.newDir()
	s.check(s.engine.CheckpointByDefault(s.ctx, first, dir))
	s.step("checkpointed %s", c.ID())
	s.waitExit(first, 137)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(s.printedNumbers(first.Output, workload.Ticks), s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.checkOtherVM(first, restored)
}

// answering is a server on the node that sends every line back.
type answering struct {
	net.Listener
	done sync.WaitGroup

	mu     sync.Mutex
	opened []net.Conn
	ended  []error

	// every is how often it pushes a message of its own, should it.
	every  time.Duration
	pushed atomic.Int64
}

// answering starts one, which ends with the scenario.
func (s *scenario) answering(w *podLink) *answering {
	s.Helper()
	return s.answeringEvery(w, 0)
}

// pushing is answering that also pushes messages all the time.
func (s *scenario) pushing(w *podLink) *answering {
	s.Helper()
	return s.answeringEvery(w, 50*time.Millisecond)
}

func (s *scenario) answeringEvery(w *podLink, every time.Duration) *answering {
	s.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(w.node.String(), "0"))
	s.check(err)
	a := &answering{Listener: l, every: every}
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
			err := a.serve(c)
			a.mu.Lock()
			defer a.mu.Unlock()
			a.ended = append(a.ended, err)
		})
	}
}

// serve sends the lines of a connection back, and pushes its own, until the
// connection ends.
func (a *answering) serve(c net.Conn) error {
	if err := retransmitOften(c); err != nil {
		return err
	}
	lines := make(chan string)
	ended := make(chan error, 1)
	stop := make(chan struct{})
	defer close(stop)
	a.done.Go(func() { ended <- readLines(c, lines, stop) })
	var push <-chan time.Time
	if a.every > 0 {
		ticker := time.NewTicker(a.every)
		defer ticker.Stop()
		push = ticker.C
	}
	for {
		var text string
		select {
		case err := <-ended:
			return err
		case text = <-lines:
		case <-push:
			text = fmt.Sprintln(workload.Push + strconv.FormatInt(a.pushed.Add(1), 10))
		}
		if _, err := io.WriteString(c, text); err != nil {
			return err
		}
	}
}

func readLines(c net.Conn, lines chan<- string, stop <-chan struct{}) error {
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return errors.New("the other end has closed it")
		}
		if err != nil {
			return err
		}
		select {
		case lines <- line:
		case <-stop:
			return nil
		}
	}
}

// tcpRTOMaxMS is of linux/tcp.h, and of Linux 6.15.
const tcpRTOMaxMS = 44

// retransmitOften has a connection send again once a second what gets no
// answer, in place of twice as late each time: so there is always a
// retransmission on its way to whoever has the address, and the connection
// continues soon once it is back. An older kernel is slower. The kernel gives up after
// a number of retransmissions, if it is not told a time.
func retransmitOften(c net.Conn) error {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, tcpRTOMaxMS, 1000) })
	if errors.Is(failed, unix.ENOPROTOOPT) {
		failed = nil
	}
	if err := errors.Join(err, failed); err != nil {
		return err
	}
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(time.Hour.Milliseconds()))
	})
	return errors.Join(err, failed)
}

// connections says how many there have been, and how those ended that have.
func (a *answering) connections() (opened int, ended []error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.opened), append([]error(nil), a.ended...)
}
