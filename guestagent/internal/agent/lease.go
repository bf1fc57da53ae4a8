// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"sync"
	"time"
)

// leases counts the connected shims and remembers what is frozen. When the last
// lease has ended and none begins within a grace period, expired is called with
// the frozen containers.
type leases struct {
	expired func(ids []string)

	mu     sync.Mutex
	count  int
	ids    map[string]bool
	expiry *time.Timer
}

func (l *leases) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	if l.expiry != nil {
		l.expiry.Stop()
		l.expiry = nil
	}
}

func (l *leases) end(grace time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count--; l.count == 0 {
		l.arm(grace)
	}
}

// frozen records a container. If there is no lease, the grace period begins.
func (l *leases) frozen(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ids == nil {
		l.ids = make(map[string]bool)
	}
	l.ids[id] = true
	if l.count == 0 {
		l.arm(leaseGrace)
	}
}

func (l *leases) thawed(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.ids, id)
}

// orphaned reports whether a container is frozen and no shim is connected.
func (l *leases) orphaned(id string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count == 0 && l.ids[id]
}

func (l *leases) arm(grace time.Duration) {
	if l.expiry != nil {
		l.expiry.Stop()
	}
	var timer *time.Timer
	timer = time.AfterFunc(grace, func() {
		l.mu.Lock()
		if l.expiry != timer || l.count > 0 {
			l.mu.Unlock()
			return
		}
		l.expiry = nil
		ids := make([]string, 0, len(l.ids))
		for id := range l.ids {
			ids = append(ids, id)
		}
		l.mu.Unlock()
		l.expired(ids)
	})
	l.expiry = timer
}
