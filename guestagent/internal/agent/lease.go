// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"time"
)

// leases knows which shims are connected and remembers what is frozen. When the
// last lease of an owner has ended and none begins within a grace period, expired
// is called with that owner's frozen containers. For a container without an owner
// any lease counts. Any process of the host can hold a lease, but only a shim
// knows the owner of its containers.
type leases struct {
	expired func(ids []string)

	mu     sync.Mutex
	counts map[string]int         // leases, by their owner
	ids    map[string]string      // what is frozen, and its owner
	expiry map[string]*time.Timer // by owner
}

func (l *leases) begin(owner string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.counts == nil {
		l.counts = make(map[string]int)
	}
	l.counts[owner]++
	for _, of := range []string{owner, ""} {
		if t := l.expiry[of]; t != nil {
			t.Stop()
			delete(l.expiry, of)
		}
	}
}

func (l *leases) end(owner string, grace time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.counts[owner]--; l.counts[owner] == 0 {
		delete(l.counts, owner)
	}
	for _, of := range []string{owner, ""} {
		if !l.held(of) {
			l.arm(of, grace)
		}
	}
}

// frozen records a container. If there is no lease of its owner, the grace period
// begins.
func (l *leases) frozen(id, owner string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ids == nil {
		l.ids = make(map[string]string)
	}
	l.ids[id] = owner
	if !l.held(owner) {
		l.arm(owner, leaseGrace)
	}
}

func (l *leases) thawed(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.ids, id)
}

// orphaned reports whether a container is frozen and its owner is not connected.
func (l *leases) orphaned(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	owner, frozen := l.ids[id]
	return frozen && !l.held(owner)
}

func (l *leases) held(owner string) bool {
	if owner == "" {
		return len(l.counts) > 0
	}
	return l.counts[owner] > 0
}

func (l *leases) arm(owner string, grace time.Duration) {
	if t := l.expiry[owner]; t != nil {
		t.Stop()
	}
	if l.expiry == nil {
		l.expiry = make(map[string]*time.Timer)
	}
	var timer *time.Timer
	timer = time.AfterFunc(grace, func() {
		l.mu.Lock()
		if l.expiry[owner] != timer || l.held(owner) {
			l.mu.Unlock()
			return
		}
		delete(l.expiry, owner)
		var ids []string
		for id, of := range l.ids {
			if of == owner {
				ids = append(ids, id)
			}
		}
		l.mu.Unlock()
		l.expired(ids)
	})
	l.expiry[owner] = timer
}
