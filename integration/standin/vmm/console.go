// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bytes"
	"io"
	"sync"
)

// console is the guest's serial line: everything is written to the log, and
// ready is closed when one of the signs was printed.
type console struct {
	log   io.Writer
	signs [][]byte
	ready chan struct{}
	once  sync.Once
	tail  []byte // the end of earlier output, in which a sign may begin
}

func newConsole(log io.Writer, signs []string) *console {
	c := &console{log: log, ready: make(chan struct{})}
	for _, s := range signs {
		c.signs = append(c.signs, []byte(s))
	}
	return c
}

// Write never fails: a full disk must not stop the guest's console.
func (c *console) Write(p []byte) (int, error) {
	_, _ = c.log.Write(p)
	select {
	case <-c.ready:
		return len(p), nil
	default:
	}
	seen := append(c.tail, p...)
	longest := 0
	for _, sign := range c.signs {
		if bytes.Contains(seen, sign) {
			c.once.Do(func() { close(c.ready) })
		}
		longest = max(longest, len(sign))
	}
	c.tail = append([]byte(nil), seen[max(0, len(seen)-longest+1):]...)
	return len(p), nil
}
