// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// ownAddress: sockets that are bound to the container's own address are bound
// to its new one after a restore elsewhere: a TCP listener, a UDP server, a
// connected UDP client, and a TCP connection of the program to itself. The
// image set stays what it was. A container without an address is refused.
func ownAddress(s *scenario) {
	path := linkPath()
	before := s.connectedLink(path)
	service := testAddresses()(1)
	s.check(before.addToNode(service))
	echo := s.echoingUDP(service)

	container := engine.Container{ID: "c", Args: []string{workload.Path, "own-address", "-server", echo.LocalAddr().String()}, Network: path}
	c := s.create(container)
	first := s.run(c)
	s.checkOwnAddress(first, before, 1)

	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	printed := s.printedNumbers(first.Output, workload.Rounds)
	s.check(before.remove())
	files := filepath.Join(dir, "files.img")
	was, err := os.ReadFile(files)
	s.check(err)

	after := s.connectedLink(path)
	s.check(after.addToNode(service))
	restored := s.restore(c, dir)
	s.checkOwnAddress(restored, after, 2)
	s.checkConsecutive(1, append(printed, s.waitNumbers(restored.Output, workload.Rounds, 3)...))
	s.checkOtherVM(first, restored)
	is, err := os.ReadFile(files)
	s.check(err)
	if !bytes.Equal(was, is) {
		s.Errorf("the restore has changed %s", files)
	}
	s.remove(c)

	container.ID, container.Network = "nowhere", ""
	run, err := s.engine.Restore(s.ctx, s.create(container), dir)
	if err == nil {
		s.Fatalf("%s is restored without a network", run.ID())
	}
	s.step("without a network: %v", err)
	for _, part := range []string{"socket is bound to its own address " + before.pod.String(), "restore it where it gets that address"} {
		if !strings.Contains(err.Error(), part) {
			s.Errorf("the refusal lacks %q: %v", part, err)
		}
	}
}

// checkOwnAddress checks that all sockets of the program are at the link's
// address, and that its servers can be reached there. Its TCP server has
// answered nth-1 questions.
func (s *scenario) checkOwnAddress(run *engine.Run, w *podLink, nth int) {
	s.Helper()
	const sockets = 5
	s.waitLine(run.Output, 0, workload.Bound+strings.Repeat(" "+w.pod.String(), sockets))
	s.waitNumbers(run.Output, workload.Rounds, 2)
	s.checkAnswer(net.JoinHostPort(w.pod.String(), fmt.Sprint(workload.OwnAddressTCP)), "say in", fmt.Sprintf("%d in", nth))
	conn, err := net.Dial("udp4", net.JoinHostPort(w.pod.String(), fmt.Sprint(workload.OwnAddressUDP)))
	s.check(err)
	defer conn.Close()
	answer, err := workload.Exchange(conn, "in")
	s.check(err)
	if answer != "heard in" {
		s.Errorf("the UDP server answers %q", answer)
	}
	s.step("%s has its sockets at %s", run.ID(), w.pod)
}

// echoingUDP is a server on the node that sends every datagram back. It ends
// with the scenario.
func (s *scenario) echoingUDP(ip net.IP) *net.UDPConn {
	s.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: ip})
	s.check(err)
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				// What cannot be sent is lost, as any datagram may be.
				_, _ = conn.WriteToUDPAddrPort(buf[:n], from)
			}
		}
	})
	s.Cleanup(func() {
		conn.Close()
		done.Wait()
	})
	return conn
}
