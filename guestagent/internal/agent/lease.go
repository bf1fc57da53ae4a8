package agent

import (
	"sync"
	"time"
)

// holders counts the shims that are there, and knows what they have frozen.
// When the last one has gone and none has come within a grace time, expired is
// called with the frozen containers.
type holders struct {
	expired func(ids []string)

	mu     sync.Mutex
	count  int
	ids    map[string]bool
	expiry *time.Timer
}

func (h *holders) enter() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.count++
	if h.expiry != nil {
		h.expiry.Stop()
		h.expiry = nil
	}
}

func (h *holders) leave(grace time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.count--; h.count == 0 {
		h.arm(grace)
	}
}

// frozen notes a container. Where nobody holds, the clock runs already.
func (h *holders) frozen(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ids == nil {
		h.ids = make(map[string]bool)
	}
	h.ids[id] = true
	if h.count == 0 {
		h.arm(holdGrace)
	}
}

func (h *holders) thawed(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ids, id)
}

func (h *holders) arm(grace time.Duration) {
	if h.expiry != nil {
		h.expiry.Stop()
	}
	var timer *time.Timer
	timer = time.AfterFunc(grace, func() {
		h.mu.Lock()
		if h.expiry != timer || h.count > 0 {
			h.mu.Unlock()
			return
		}
		h.expiry = nil
		ids := make([]string, 0, len(h.ids))
		for id := range h.ids {
			ids = append(ids, id)
		}
		h.mu.Unlock()
		h.expired(ids)
	})
	h.expiry = timer
}

// keyedMutex is one mutex a key. Keys are container ids: few, and short-lived
// as the VM is.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]*sync.Mutex
}

// lock takes the key's mutex and returns its release.
func (k *keyedMutex) lock(key string) func() {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = make(map[string]*sync.Mutex)
	}
	m := k.locks[key]
	if m == nil {
		m = &sync.Mutex{}
		k.locks[key] = m
	}
	k.mu.Unlock()
	m.Lock()
	return m.Unlock
}
