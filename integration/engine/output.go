// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
)

// Output collects the lines that a task prints. Successive tasks may share one.
type Output struct {
	mu      sync.Mutex
	lines   []string
	partial []byte
	more    chan struct{} // closed and replaced with every line
}

// NewOutput returns an empty Output.
func NewOutput() *Output { return &Output{more: make(chan struct{})} }

// Write implements io.Writer.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.partial = append(o.partial, p...)
	for {
		line, rest, ok := bytes.Cut(o.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		o.lines = append(o.lines, string(line))
		o.partial = rest
		close(o.more)
		o.more = make(chan struct{})
	}
}

// Lines returns everything printed so far; an unterminated last line counts as
// a line.
func (o *Output) Lines() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := append([]string(nil), o.lines...)
	if len(o.partial) > 0 {
		out = append(out, string(o.partial))
	}
	return out
}

// Wait returns once the condition holds for the complete lines; it is called
// again for every new one. An error of the condition ends the wait.
func (o *Output) Wait(ctx context.Context, condition func(lines []string) (bool, error)) error {
	for {
		o.mu.Lock()
		lines, more := slices.Clip(o.lines), o.more
		o.mu.Unlock()
		if ok, err := condition(lines); ok || err != nil {
			return err
		}
		select {
		case <-more:
		case <-ctx.Done():
			last := "nothing"
			if len(lines) > 0 {
				last = fmt.Sprintf("%d lines, the last %q", len(lines), lines[len(lines)-1])
			}
			return fmt.Errorf("wait for output (there is %s): %w", last, ctx.Err())
		}
	}
}
