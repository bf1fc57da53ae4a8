// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	// keptLimit bounds what is kept of the log while it has no reader, in bytes.
	keptLimit = 64 << 10
	// keptRetry is the interval at which a reader is polled for.
	keptRetry = time.Second
)

// openLog sends the log, and what Go's runtime prints when it panics, to the
// FIFO that containerd created in the bundle, which Kata's shim writes to as
// well. Without a FIFO the log is discarded.
func openLog(debugging bool) {
	_ = log.SetFormat(log.TextFormat)
	if debugging {
		_ = log.SetLevel(log.DebugLevel)
	}
	fd, err := unix.Open("log", unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		log.L.Logger.SetOutput(io.Discard)
		return
	}
	_ = unix.Dup2(fd, int(os.Stderr.Fd()))
	log.L.Logger.SetOutput(&keeper{to: os.NewFile(uintptr(fd), "log"), retry: keptRetry})
}

// keeper writes the log. While containerd is not running, nobody reads it: the
// next containerd gets the log of operations that were in progress.
type keeper struct {
	to    io.Writer
	retry time.Duration

	mu   sync.Mutex
	kept []byte
}

// Write never fails: the log has no other destination.
func (k *keeper) Write(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	waiting := len(k.kept) > 0
	k.kept = append(k.kept, p...)
	k.flush()
	if len(k.kept) > 0 && !waiting {
		k.later()
	}
	return len(p), nil
}

// flush is called with the mutex held.
func (k *keeper) flush() {
	n, _ := k.to.Write(k.kept)
	if k.kept = k.kept[n:]; len(k.kept) == 0 {
		k.kept = nil
		return
	}
	if excess := len(k.kept) - keptLimit; excess > 0 {
		// Drop the oldest lines.
		_, k.kept, _ = bytes.Cut(k.kept[excess:], []byte("\n"))
	}
}

func (k *keeper) later() {
	time.AfterFunc(k.retry, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.flush(); len(k.kept) > 0 {
			k.later()
		}
	})
}
