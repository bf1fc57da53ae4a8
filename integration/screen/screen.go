// Package screen shows a person how far a program is: a line a step with its time, and a bar for steps that take a while. The demonstration
// and the benchmarks use it. Where the output is no terminal there are plain lines only.
package screen

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	titleWidth = 58
	barWidth   = 24
	// barAfter is when a step is long enough for a bar.
	barAfter = 2 * time.Second
	refresh  = 100 * time.Millisecond
)

// Screen writes to one output.
type Screen struct {
	out  io.Writer
	live bool
}

// New shows on a file; on a terminal, with bars that move.
func New(f *os.File) *Screen {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &Screen{out: f, live: err == nil && os.Getenv("TERM") != "dumb"}
}

// Print writes text between steps.
func (s *Screen) Print(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// Step runs do and shows a line with its title, the time that it took, and whether it failed. usual is the time that it takes as a rule: a
// bar's length stands for it.
func (s *Screen) Step(title string, usual time.Duration, do func() error) error {
	start := time.Now()
	done := make(chan struct{})
	var shown sync.WaitGroup
	if s.live {
		shown.Go(func() { s.animate(title, usual, start, done) })
	}
	err := do()
	close(done)
	shown.Wait()
	mark := "ok"
	if err != nil {
		mark = "failed"
	}
	fmt.Fprintf(s.out, "  %-*s %6.1f s  %s\n", titleWidth, title, time.Since(start).Seconds(), mark)
	return err
}

// animate redraws the step's line until done, and leaves it empty.
func (s *Screen) animate(title string, usual time.Duration, start time.Time, done <-chan struct{}) {
	ticker := time.NewTicker(refresh)
	defer ticker.Stop()
	for {
		elapsed := time.Since(start)
		line := fmt.Sprintf("  %-*s %6.1f s", titleWidth, title, elapsed.Seconds())
		if elapsed >= barAfter {
			line += "  " + Bar(elapsed, usual)
		}
		fmt.Fprintf(s.out, "\r\x1b[K%s", line)
		select {
		case <-done:
			fmt.Fprint(s.out, "\r\x1b[K")
			return
		case <-ticker.C:
		}
	}
}

// Bar draws the part of the usual time that has passed. It is full only when the step is done, however long that takes.
func Bar(elapsed, usual time.Duration) string {
	filled := barWidth - 1
	if elapsed < usual {
		filled = int(int64(filled) * int64(elapsed) / int64(usual))
	}
	return "[" + strings.Repeat("#", filled) + strings.Repeat(".", barWidth-filled) + "]"
}
