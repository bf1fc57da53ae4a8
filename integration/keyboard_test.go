package integration

import "io"

// keyboard is a stdin that a scenario types on.
type keyboard struct {
	*io.PipeReader
	keys    *io.PipeWriter
	pending chan string
}

func newKeyboard() *keyboard {
	r, w := io.Pipe()
	k := &keyboard{PipeReader: r, keys: w, pending: make(chan string, 64)}
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

// typed does not wait for somebody to read it.
func (k *keyboard) typed(text string) { k.pending <- text }

// Close lets nobody read any more.
func (k *keyboard) Close() error {
	close(k.pending)
	return k.PipeReader.Close()
}
