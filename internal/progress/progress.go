// SPDX-License-Identifier: Apache-2.0

// Package progress shows how far long work is: the phase, bytes and rate. On a
// terminal that is a bar for each piece of work, elsewhere a line every few
// seconds.
package progress

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// Bar is one piece of work. Its methods can be called from several goroutines.
type Bar interface {
	// Phase begins a phase of about total bytes, or of none that anybody counts if
	// total is 0.
	Phase(name string, total int64)
	// Total corrects the total of the phase.
	Total(total int64)
	// Set tells how many bytes of the phase are done, and Add how many more.
	Set(done int64)
	Add(more int64)
	// Done ends the work.
	Done()
}

// Interval is the time between two lines where there is no terminal.
const Interval = 2 * time.Second

// width of a bar's name on a terminal of 80 columns.
const width = 20

// Display shows bars. Callers end with Close.
type Display struct {
	w     io.Writer
	bars  *mpb.Progress // on a terminal
	mu    sync.Mutex
	lines []*bar
	done  chan struct{}
	wait  sync.WaitGroup
}

// New returns a display on w, nil for none, that updates at the latest every
// interval.
func New(w io.Writer, interval time.Duration) *Display {
	d := &Display{w: w, done: make(chan struct{})}
	switch {
	case w == nil:
	case IsTerminal(w):
		d.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(80), mpb.WithAutoRefresh())
	default:
		d.wait.Go(func() { d.tick(interval) })
	}
	return d
}

// IsTerminal reports whether w is a terminal on which a line can be replaced.
func IsTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	st, err := file.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}

// Bar adds a piece of work.
func (d *Display) Bar(name string) Bar {
	b := &bar{d: d, name: text.Line(name, text.MaxName), begin: time.Now()}
	if d.bars != nil {
		b.mpb = d.bars.New(0, mpb.BarStyle().Lbound("[").Filler("=").Tip(">").Padding(" ").Rbound("]"),
			mpb.PrependDecorators(decor.Any(func(decor.Statistics) string { return b.title() })),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return b.figures() })))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, b)
	return b
}

// Close ends all bars and the display.
func (d *Display) Close() {
	close(d.done)
	d.wait.Wait()
	if d.bars == nil {
		return
	}
	for _, b := range d.lines {
		if !b.ended {
			b.mpb.Abort(false)
		}
	}
	d.bars.Wait()
}

func (d *Display) tick(interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-d.done:
			return
		case <-tick.C:
			d.mu.Lock()
			for _, b := range d.lines {
				b.line()
			}
			d.mu.Unlock()
		}
	}
}

type bar struct {
	d    *Display
	name string
	mpb  *mpb.Bar
	// begin is that of the work.
	begin time.Time

	mu    sync.Mutex
	phase string
	// since is when the phase has begun.
	since       time.Time
	total, done int64
	// moved are the bytes of all phases.
	moved int64
	ended bool
}

// Phase implements [Bar].
func (b *bar) Phase(name string, total int64) {
	b.mu.Lock()
	counted := b.total > 0
	b.mu.Unlock()
	if counted && b.mpb == nil {
		b.line() // also of a phase that was short
	}
	b.mu.Lock()
	b.moved += b.done
	b.phase, b.total, b.done, b.since = name, max(total, 0), 0, time.Now()
	b.mu.Unlock()
	if b.mpb != nil {
		b.mpb.SetTotal(max(total, 1), false)
		b.mpb.SetCurrent(0)
		return
	}
	b.line()
}

// Total implements [Bar].
func (b *bar) Total(total int64) {
	b.mu.Lock()
	b.total = max(total, 0)
	b.mu.Unlock()
	if b.mpb != nil {
		b.mpb.SetTotal(max(total, 1), false)
	}
}

// Set implements [Bar].
func (b *bar) Set(done int64) {
	b.mu.Lock()
	b.done = done
	total := b.total
	b.mu.Unlock()
	if b.mpb != nil {
		b.mpb.SetCurrent(min(done, max(total, 1)))
	}
}

// Add implements [Bar].
func (b *bar) Add(more int64) {
	b.mu.Lock()
	done := b.done + more
	b.mu.Unlock()
	b.Set(done)
}

// Done implements [Bar].
func (b *bar) Done() {
	b.mu.Lock()
	b.moved += b.done
	b.phase, b.done, b.total, b.since, b.ended = "done", b.moved, b.moved, b.begin, true
	b.mu.Unlock()
	if b.mpb != nil {
		b.mpb.SetTotal(1, false)
		b.mpb.SetCurrent(1)
		b.mpb.SetTotal(-1, true)
		return
	}
	if b.d.w != nil {
		fmt.Fprintln(b.d.w, b.text())
	}
}

// line prints where the work is, unless it has ended.
func (b *bar) line() {
	b.mu.Lock()
	ended := b.ended || b.phase == ""
	b.mu.Unlock()
	if !ended && b.d.w != nil {
		fmt.Fprintln(b.d.w, b.text())
	}
}

func (b *bar) text() string { return b.name + ": " + b.current() + " " + b.figures() }

func (b *bar) current() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.phase
}

func (b *bar) title() string {
	return fmt.Sprintf("%-*s", width, text.Line(b.name+" "+b.current(), width-1))
}

// figures are bytes, share and rate of a phase, or how long it has taken.
func (b *bar) figures() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	took := time.Since(b.since)
	rate := ""
	if s := took.Seconds(); s > 0 && b.done > 0 {
		rate = ", " + Bytes(int64(float64(b.done)/s)) + "/s"
	}
	switch {
	case b.ended:
		return fmt.Sprintf("(100 %%), %s in %.1f s%s", Bytes(b.moved), took.Seconds(), rate)
	case b.total == 0:
		return fmt.Sprintf("%.1f s", took.Seconds())
	}
	return fmt.Sprintf("(%d %%), %s of %s%s", b.percent(), Bytes(b.done), Bytes(max(b.total, b.done)), rate)
}

// percent is never 100 before a phase is over: a total may be an estimate.
func (b *bar) percent() int64 {
	if b.done >= b.total {
		return 99
	}
	return min(99, b.done*100/cmp.Or(b.total, 1))
}

// Bytes is a size for a reader.
func Bytes(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/unit, 0
	for ; f >= unit && i < 3; i++ {
		f /= unit
	}
	return fmt.Sprintf("%.1f %s", f, [...]string{"KiB", "MiB", "GiB", "TiB"}[i])
}
