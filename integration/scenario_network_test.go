// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// networked: a container that is given a network namespace with an interface in
// it reaches the node and is reached from there. The same after a restore in
// another VM, for which the namespace is recreated, with another address, as
// for a new pod. No connection is open meanwhile.
func networked(s *scenario) {
	path := linkPath()
	before := s.connectedLink(path)
	c := s.create(engine.Container{ID: "c", Args: relay, Network: path})
	first := s.run(c)
	s.checkInterface(first, before)
	s.checkTraffic(first, before, 1)

	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	s.check(before.remove())

	after := s.connectedLink(path)
	restored := s.restore(c, dir)
	s.checkTraffic(restored, after, 3)
	s.checkInterface(restored, after)
	s.checkOtherVM(first, restored)
	s.remove(c)
}

// networkHotplugged: the same for a container whose hooks bring the interface
// when the VM runs already, as nerdctl's do, before the restore as well.
func networkHotplugged(s *scenario) {
	w := s.unconnectedLink()
	c := s.create(engine.Container{ID: "c", Args: relay, Hooks: w.hooks()})
	first := s.run(c)
	s.checkInterface(first, w)
	s.checkTraffic(first, w, 1)

	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	s.check(w.remove())

	s.check(w.create())
	restored := s.restore(c, dir)
	s.checkTraffic(restored, w, 3)
	s.checkInterface(restored, w)
	s.checkOtherVM(first, restored)
	s.remove(c)
}

const relayPort = "8080"

var relay = []string{workload.Path, "relay", "-listen", ":" + relayPort}

// checkTraffic checks that traffic goes both ways between a relay and the node.
// The answers are numbered from first on.
func (s *scenario) checkTraffic(run *engine.Run, w *podLink, first int) {
	s.Helper()
	// It listens before it prints.
	s.check(run.Output.Wait(s.ctx, func(lines []string) (bool, error) { return len(lines) > 0, nil }))
	address := net.JoinHostPort(w.pod.String(), relayPort)
	s.checkAnswer(address, "say in", fmt.Sprintf("%d in", first))
	s.step("reached %s from the node", address)

	l, err := net.Listen("tcp", net.JoinHostPort(w.node.String(), "0"))
	s.check(err)
	defer l.Close()
	heard := make(chan error, 1)
	go func() { heard <- answerOnce(l, w.pod) }()
	s.checkAnswer(address, fmt.Sprintf("ask %s out", l.Addr()), fmt.Sprintf("%d heard out", first+1))
	l.Close()
	s.check(<-heard)
	s.step("reached %s from the container", l.Addr())
}

func (s *scenario) checkAnswer(address, question, want string) {
	s.Helper()
	answer, err := workload.Ask(address, question)
	s.check(err)
	if answer != want {
		s.Fatalf("%s answers %q to %q, not %q", address, answer, question, want)
	}
}

// answerOnce serves one connection, which has to come from a certain address.
func answerOnce(l net.Listener, from net.IP) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	if peer := c.RemoteAddr().(*net.TCPAddr); !peer.IP.Equal(from) {
		return fmt.Errorf("the connection comes from %s, not from %s", peer, from)
	}
	if err := c.SetDeadline(time.Now().Add(paced(settleTimeout))); err != nil {
		return err
	}
	question, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c, "heard %s", question)
	return err
}

// checkInterface checks what a container sees of its interface.
func (s *scenario) checkInterface(run *engine.Run, w *podLink) {
	s.Helper()
	lines := s.shell(run, "cd /sys/class/net/eth0; cat address mtu; ip -4 -o address show eth0 | awk '{print $4}'; ip route show | awk '/^default/ {print $3}'")
	want := []string{w.mac.String(), fmt.Sprint(mtu), w.pod.String() + "/30", w.node.String()}
	if !slices.Equal(lines, want) {
		s.Errorf("the container's interface is %q, not %q", lines, want)
	}
}
