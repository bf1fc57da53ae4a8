// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"
)

// beat is how often pulse looks at the clock.
const beat = time.Millisecond

// pulse measures what its processes feel: the longest time between two looks at
// the clock, which it takes every millisecond. In between it writes to a part of
// its memory.
type pulse struct {
	mib int
	// percent of the memory is written each second.
	percent float64

	data    []byte
	longest atomic.Int64 // nanoseconds, since the last round
	n       int
}

// begin fills the memory and starts to look at the clock.
func (p *pulse) begin() {
	p.data = make([]byte, p.mib*mib)
	random := rand.NewPCG(rand.Uint64(), rand.Uint64())
	for i := 0; i < len(p.data); i += 512 { // enough that no page is like another
		p.data[i], p.data[i+1] = byte(random.Uint64()), byte(1)
	}
	go p.beat()
}

// pulsePage is the unit in which memory is written.
const pulsePage = 4096

func (p *pulse) beat() {
	last, page, owed := time.Now(), 0, 0.0
	pages := len(p.data) / pulsePage
	for range time.Tick(beat) {
		now := time.Now()
		gap := now.Sub(last)
		last = now
		for {
			longest := p.longest.Load()
			if int64(gap) <= longest || p.longest.CompareAndSwap(longest, int64(gap)) {
				break
			}
		}
		if pages == 0 {
			continue
		}
		// After a long gap, no burst.
		owed += min(gap, 10*beat).Seconds() * p.percent / 100 * float64(pages)
		for ; owed >= 1; owed-- {
			p.data[page*pulsePage]++
			page = (page + 1) % pages
		}
	}
}

func (p *pulse) round(w io.Writer) error {
	p.n++
	_, err := fmt.Fprintf(w, "round %d longest %d\n", p.n, p.longest.Swap(0))
	return err
}

// Longest returns the longest gap that pulse has printed.
func Longest(lines []string) (longest time.Duration, err error) {
	for _, line := range lines {
		if !strings.HasPrefix(line, "round ") {
			continue
		}
		var n int
		var gap time.Duration
		if _, err := fmt.Sscanf(line, "round %d longest %d", &n, &gap); err != nil {
			return 0, fmt.Errorf("pulse printed %q", line)
		}
		longest = max(longest, gap)
	}
	return longest, nil
}
