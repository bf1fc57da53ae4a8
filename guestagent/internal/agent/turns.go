// SPDX-License-Identifier: Apache-2.0

package agent

import "sync"

// turns remembers which thaw of each container was the last. The server handles
// requests concurrently: a Freeze whose caller has given up may be handled after
// the Thaw that followed it, and must not freeze anything then.
type turns struct {
	mu     sync.Mutex
	thawed map[string]uint64 // by container ID
}

// thaw notes a thaw. Shims that do not number their requests have the turn 0.
func (t *turns) thaw(id string, turn uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if turn > t.thawed[id] {
		if t.thawed == nil {
			t.thawed = make(map[string]uint64)
		}
		t.thawed[id] = turn
	}
}

// over reports whether a request of this turn comes after a thaw that followed it.
func (t *turns) over(id string, turn uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return turn != 0 && turn < t.thawed[id]
}

func (t *turns) forget(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.thawed, id)
}
