// SPDX-License-Identifier: Apache-2.0

package integration

import "io"

// terminalInput is a stdin that a scenario types on.
type terminalInput struct {
	*io.PipeReader
	keys    *io.PipeWriter
	pending chan string
}

func newTerminalInput() *terminalInput {
	r, w := io.Pipe()
	k := &terminalInput{PipeReader: r, keys: w, pending: make(chan string, 64)}
	go func() {
		defer w.Close()
		for text := range k.pending {
			if _, err := io.WriteString(w, text); err != nil {
				return // closed
			}
		}
	}()
	return k
}

// send does not wait for somebody to read it.
func (k *terminalInput) send(text string) { k.pending <- text }

// Close lets nobody read any more.
func (k *terminalInput) Close() error {
	close(k.pending)
	return k.PipeReader.Close()
}
