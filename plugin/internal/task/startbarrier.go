package task

import (
	"context"
	"sync"
)

// launches are a container's processes on their way from creation to start, by
// exec id, empty for the first. Kata's Go shim waits in CloseIO, with its one
// lock in hand, for the end of a copy that Start begins: a client that is quick
// to close an exec's stdin locks the shim up for ever
// (src/runtime/pkg/containerd-shim-v2/service.go). Its zero value is empty.
type startBarrier struct {
	mu  sync.Mutex
	all map[string]*launch
}

type launch struct {
	done    chan struct{}
	started bool
}

// expect notes a process that was created.
func (l *startBarrier) expect(exec string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = make(map[string]*launch)
	}
	l.all[exec] = &launch{done: make(chan struct{})}
}

// settle says how a process's Start has ended.
func (l *startBarrier) settle(exec string, started bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.all[exec]
	if p == nil {
		return
	}
	select {
	case <-p.done:
	default:
		p.started = started
		close(p.done)
	}
}

// forget drops a process that was deleted.
func (l *startBarrier) forget(exec string) {
	l.settle(exec, false)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, exec)
}

// wait returns whether a process has started, once that is known. One that
// nobody noted has.
func (l *startBarrier) wait(ctx context.Context, exec string) (bool, error) {
	l.mu.Lock()
	p := l.all[exec]
	l.mu.Unlock()
	if p == nil {
		return true, nil
	}
	select {
	case <-p.done:
		return p.started, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}
