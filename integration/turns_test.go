// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// turns decides which scenario comes next. A testbed serves one scenario at a
// time, since each looks for what it has left there, and nobody who waits for a
// testbed keeps others from running. The order is chosen so that the last
// scenarios do not run alone: first those that may take longest, then those of
// the testbed for which most wait.
type turns struct {
	mu      sync.Mutex
	free    int // how many more may run
	waiting []*turn
	busy    map[variant]*turn
}

// turn is a scenario's.
type turn struct {
	variant variant
	timeout time.Duration
	come    chan struct{} // closed when the scenario may run
}

func newTurns(atOnce int) *turns {
	return &turns{free: atOnce, busy: map[variant]*turn{}}
}

// add is called before begin.
func (q *turns) add(v variant, timeout time.Duration) *turn {
	t := &turn{variant: v, timeout: timeout, come: make(chan struct{})}
	q.waiting = append(q.waiting, t)
	return t
}

func (q *turns) begin() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next()
}

// end is called when the scenario is over, or will not run. It may be called
// again.
func (q *turns) end(t *turn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch at := slices.Index(q.waiting, t); {
	case at >= 0:
		q.waiting = slices.Delete(q.waiting, at, at+1)
	case q.busy[t.variant] == t:
		delete(q.busy, t.variant)
		q.free++
	default:
		return
	}
	q.next()
}

// next lets as many run as may.
func (q *turns) next() {
	for q.free > 0 {
		best, most := -1, 0
		for i, t := range q.waiting {
			if q.busy[t.variant] != nil {
				continue
			}
			behind := 0
			for _, other := range q.waiting {
				if other.variant == t.variant {
					behind++
				}
			}
			if best < 0 || t.timeout > q.waiting[best].timeout || t.timeout == q.waiting[best].timeout && behind > most {
				best, most = i, behind
			}
		}
		if best < 0 {
			return
		}
		t := q.waiting[best]
		q.waiting = slices.Delete(q.waiting, best, best+1)
		q.busy[t.variant] = t
		q.free--
		close(t.come)
	}
}

func TestTurns(t *testing.T) {
	one, two, three := variant{way: "one"}, variant{way: "two"}, variant{way: "three"}
	for name, tc := range map[string]struct {
		atOnce int
		add    []variant
		long   int // the index of one that may take long
		want   [][]int
	}{
		"one at a time":                         {1, []variant{one, two, one}, 1, [][]int{{1}, {0}, {2}}},
		"one for each testbed":                  {3, []variant{one, one, two}, 0, [][]int{{0, 2}, {1}}},
		"first the testbed for which most wait": {2, []variant{one, two, three, three, three}, 0, [][]int{{0, 2}, {3, 1}, {4}}},
	} {
		t.Run(name, func(t *testing.T) {
			q := newTurns(tc.atOnce)
			var all []*turn
			for i, v := range tc.add {
				all = append(all, q.add(v, map[bool]time.Duration{true: time.Hour}[i == tc.long]))
			}
			running := func() (out []int) {
				for i, turn := range all {
					select {
					case <-turn.come:
						if q.busy[turn.variant] == turn {
							out = append(out, i)
						}
					default:
					}
				}
				return out
			}
			q.begin()
			for _, want := range tc.want {
				have := running()
				if slices.Sort(want); !slices.Equal(have, want) {
					t.Fatalf("%v run, not %v", have, want)
				}
				for _, i := range have {
					q.end(all[i])
					q.end(all[i]) // changes nothing
				}
			}
			if len(q.waiting) > 0 || q.free != tc.atOnce {
				t.Errorf("%d wait, and %d more may run", len(q.waiting), q.free)
			}
		})
	}
	t.Run("those that are left out hold up nobody", func(_ *testing.T) {
		q := newTurns(1)
		a, b, c := q.add(one, 0), q.add(one, 0), q.add(two, 0)
		q.begin()
		q.end(a)
		q.end(b)
		<-c.come
		q.end(c)
	})
}
