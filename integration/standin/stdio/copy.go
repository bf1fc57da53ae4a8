// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Guest is the guest's end of the streams.
type Guest struct {
	Stdin          io.WriteCloser
	Stdout, Stderr io.Reader
}

// Copy is a running copy of one process's streams.
type Copy struct {
	way   way.Way
	guest Guest
	done  chan struct{}
	// stdinDone is closed at the end of the engine's stdin.
	stdinDone chan struct{}
	// keep is the Rust way's own write end of stdin: without it the stream
	// would end when the engine's first writer closes it.
	keep      *os.File
	keepClose sync.Once
}

// Start opens the engine's ends and copies until the end of the process's
// output.
func Start(w way.Way, namespace, id string, p Paths, guest Guest) (*Copy, error) {
	c := &Copy{way: w, guest: guest, done: make(chan struct{}), stdinDone: make(chan struct{})}
	if p.None() {
		close(c.done)
		close(c.stdinDone)
		return c, nil
	}
	if w == way.Rust && p.Stdin != "" {
		// Also for reading, so that opening it does not block; the reader opens
		// it next and finds a writer.
		keep, err := os.OpenFile(p.Stdin, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("open stdin: %w", err)
		}
		c.keep = keep
	}
	// The copy outlives the request that starts it.
	e, err := open(context.Background(), w, namespace, id, p)
	if err != nil {
		c.closeKeep()
		return nil, err
	}
	go c.run(e)
	return c, nil
}

func (c *Copy) run(e *ends) {
	var output, all sync.WaitGroup
	if e.in != nil {
		all.Go(func() {
			_, _ = io.Copy(c.guest.Stdin, e.in)
			close(c.stdinDone)
			if c.way == way.Rust {
				_ = c.guest.Stdin.Close()
			}
		})
	} else {
		close(c.stdinDone)
	}
	if e.out != nil {
		output.Go(func() { _, _ = io.Copy(e.out, c.guest.Stdout) })
	}
	if e.err != nil {
		output.Go(func() { _, _ = io.Copy(e.err, c.guest.Stderr) })
	}
	output.Wait()
	c.closeKeep()
	e.close() // also ends the copy of stdin
	all.Wait()
	close(c.done)
}

// Done is closed when all of the process's output is copied.
func (c *Copy) Done() <-chan struct{} { return c.done }

// CloseStdin closes the process's stdin once all of it is copied. The Go way
// waits here, under its caller's lock, while the engine keeps its own end open,
// as Kata does.
func (c *Copy) CloseStdin() error {
	if c.way == way.Rust {
		c.closeKeep()
		return nil
	}
	<-c.stdinDone
	return c.guest.Stdin.Close()
}

func (c *Copy) closeKeep() {
	if c.keep != nil {
		c.keepClose.Do(func() { c.keep.Close() })
	}
}
