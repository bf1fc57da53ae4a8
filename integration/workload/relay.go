// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

// relay answers over TCP, one line for each connection. It counts requests in
// memory and prints the count in each answer.
type relay struct {
	address string
	served  int
	failed  atomic.Pointer[error]
}

// relayTimeout bounds one exchange.
const relayTimeout = time.Minute

func (r *relay) listen() error {
	// As any server in Go: with MPTCP, which CRIU does not support, if the
	// guest has it.
	l, err := net.Listen("tcp", r.address)
	if err != nil {
		return err
	}
	r.address = l.Addr().String()
	r.serveAll(l)
	return nil
}

// serveAll serves connections, one after the other, in the background.
func (r *relay) serveAll(l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				r.failed.Store(&err)
				return
			}
			r.serve(c)
		}
	}()
}

func (r *relay) round(io.Writer) error {
	if err := r.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// serve answers one request and closes the connection. When the peer sees EOF,
// the program has no connection open.
func (r *relay) serve(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(relayTimeout)) // a lost connection fails in the read
	request, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	r.served++
	answer, err := answerTo(strings.TrimSuffix(request, "\n"))
	if err != nil {
		answer = "error: " + err.Error()
	}
	fmt.Fprintf(c, "%d %s\n", r.served, answer)
}

func answerTo(request string) (string, error) {
	verb, rest, _ := strings.Cut(request, " ")
	switch verb {
	case "say":
		return rest, nil
	case "ask":
		address, question, _ := strings.Cut(rest, " ")
		return Ask(address, question)
	}
	return "", fmt.Errorf("unknown request %q", request)
}

// Ask sends one line to a TCP server and returns the line that it answers
// before it closes the connection. The program relay is such a server: it
// answers "say WORDS" with the words, and "ask ADDRESS WORDS" with another
// server's answer to them, each after a number.
func Ask(address, question string) (string, error) {
	c, err := net.DialTimeout("tcp", address, relayTimeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(relayTimeout)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, question); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(c)
	if err != nil {
		return "", err
	}
	line, whole := strings.CutSuffix(string(answer), "\n")
	if !whole {
		return "", fmt.Errorf("ask %s: the answer ends after %q", address, answer)
	}
	return line, nil
}
