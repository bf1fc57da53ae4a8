package task

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// launches are a container's processes on their way from creation to start, by
// exec id, empty for the first. Kata's Go shim waits in CloseIO, with its one
// lock in hand, for the end of a copy that Start begins: a client that is quick
// to close an exec's stdin locks the shim up for ever
// (src/runtime/pkg/containerd-shim-v2/service.go). Its zero value is empty.
type launches struct {
	mu  sync.Mutex
	all map[string]*launch
}

type launch struct {
	done    chan struct{}
	started bool
}

// expect notes a process that was created.
func (l *launches) expect(exec string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = make(map[string]*launch)
	}
	l.all[exec] = &launch{done: make(chan struct{})}
}

// settle says how a process's Start has ended.
func (l *launches) settle(exec string, started bool) {
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
func (l *launches) forget(exec string) {
	l.settle(exec, false)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, exec)
}

// wait returns whether a process has started, once that is known. One that
// nobody noted has.
func (l *launches) wait(ctx context.Context, exec string) (bool, error) {
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

// closeWait is how long a CloseIO waits for Kata's answer.
const closeWait = 100 * time.Millisecond

// CloseIO is forwarded once the process has been started. One that could not
// be has nothing to close.
//
// Kata's Go shim answers only when the client has closed its end of the stdin
// pipe, too, which containerd's own ctr does after the answer: there the answer
// is given first.
func (s *Service) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	if c := s.container(r.ID); c != nil {
		started, err := c.launches.wait(ctx, r.ExecID)
		if err != nil {
			return nil, fmt.Errorf("close stdin of a process in container %s that has not started: %w", r.ID, err)
		}
		if !started {
			return &emptypb.Empty{}, nil
		}
	}
	type answer struct {
		resp *emptypb.Empty
		err  error
	}
	answered := make(chan answer, 1)
	// The caller's metadata and deadline, and not the end of its call; but ours.
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(s.cfg.OpTimeout)
	}
	kctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	unhook := context.AfterFunc(s.base, cancel)
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		defer cancel()
		defer unhook()
		resp := &emptypb.Empty{}
		err := s.down.call(kctx, "CloseIO", r, resp)
		answered <- answer{resp, err}
	}()
	select {
	case a := <-answered:
		if errors.Is(a.err, ttrpc.ErrClosed) {
			<-ctx.Done() // as in pass
			return nil, errKataGone
		}
		return a.resp, a.err
	case <-time.After(closeWait):
		return &emptypb.Empty{}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
