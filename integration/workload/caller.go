// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// caller keeps one TCP connection open. In every round it sends a number and
// expects it back. What the server pushes in between has to be numbered from 1.
type caller struct {
	address string
	conn    net.Conn
	answers *bufio.Reader
	count   int
	pushed  int
}

// Push precedes the numbers that a server may send to a caller in addition to
// its answers.
const Push = "push "

func (c *caller) connect() error {
	// A container's network interface may appear after its init.
	deadline := time.Now().Add(relayTimeout)
	for {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(context.Background(), "tcp", c.address)
		if err == nil {
			c.conn, c.answers = conn, bufio.NewReader(conn)
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
	}
}

func (c *caller) round(w io.Writer) error {
	if err := c.exchange(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, "round", c.count)
	return err
}

// exchange sends a number and waits for it to come back. There is no deadline:
// one set before a checkpoint would have passed after it.
func (c *caller) exchange() error {
	c.count++
	if _, err := fmt.Fprintln(c.conn, c.count); err != nil {
		return fmt.Errorf("the connection is lost: %w", err)
	}
	for {
		line, err := c.answers.ReadString('\n')
		if err != nil {
			return fmt.Errorf("the connection is lost: %w", err)
		}
		pushed, isPush := strings.CutPrefix(line, Push)
		switch {
		case !isPush && line == fmt.Sprintln(c.count):
			return nil
		case !isPush:
			return fmt.Errorf("the answer to %d is %q", c.count, line)
		}
		if c.pushed++; pushed != fmt.Sprintln(c.pushed) {
			return fmt.Errorf("the server's message %d is %q", c.pushed, pushed)
		}
	}
}
