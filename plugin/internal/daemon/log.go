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
	// keptLimit bounds what is kept of the log while nobody reads it, in bytes.
	keptLimit = 64 << 10
	// keptRetry is the time between two looks for a reader.
	keptRetry = time.Second
)

// openLog sends the log, and Go's last words, to the FIFO that containerd made
// in the bundle. It has several writers: Kata's shim is one. Without a reader
// there is no log.
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

// keeper writes the log. While containerd is away nobody reads: what became of
// an operation that was under way is said to the next containerd.
type keeper struct {
	to    io.Writer
	retry time.Duration

	mu   sync.Mutex
	kept []byte
}

// Write never fails: there is no other place for the log.
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
		// The oldest lines go.
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
