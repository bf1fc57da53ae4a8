package workload

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"time"
)

// caller keeps one TCP connection open. In every round it sends a number, and the same has to come back.
type caller struct {
	address string
	conn    net.Conn
	answers *bufio.Reader
	count   int
}

func (c *caller) connect() error {
	// The interface of a container may come a moment after its first process.
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
	c.count++
	if _, err := fmt.Fprintln(c.conn, c.count); err != nil {
		return fmt.Errorf("the connection is lost: %w", err)
	}
	// No deadline: one that was set before a checkpoint would be over after it.
	line, err := c.answers.ReadString('\n')
	if err != nil {
		return fmt.Errorf("the connection is lost: %w", err)
	}
	if want := fmt.Sprintln(c.count); line != want {
		return fmt.Errorf("the answer to %q is %q", want, line)
	}
	_, err = fmt.Fprintln(w, "round", c.count)
	return err
}
