// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
)

const waitLimit = 20 * time.Second

// connect returns a guest and the agent that leads to it.
func connect(t *testing.T, lost func()) (*fake.Guest, *Agent) {
	t.Helper()
	g := fake.NewGuest(t, "sb", false)
	if lost == nil {
		lost = func() {}
	}
	a := New(func(ctx context.Context) (net.Conn, error) {
		location, err := g.Management.Guest(ctx, "sb")
		if err != nil {
			return nil, err
		}
		return location.Dial(ctx, fake.Port)
	}, lost)
	t.Cleanup(a.Close)
	return g, a
}

func forget(ctx context.Context, s api.AgentService) error {
	_, err := s.Forget(ctx, &api.ContainerRequest{ContainerId: "c"})
	return err
}

func TestOneConnectionForAll(t *testing.T) {
	g := fake.NewGuest(t, "sb", false)
	var dialled atomic.Int32
	a := New(func(ctx context.Context) (net.Conn, error) {
		dialled.Add(1)
		location, err := g.Management.Guest(ctx, "sb")
		if err != nil {
			return nil, err
		}
		return location.Dial(ctx, fake.Port)
	}, func() {})
	defer a.Close()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := a.CallIdempotent(t.Context(), forget); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := dialled.Load(); n != 1 {
		t.Errorf("dialled %d times", n)
	}
	if err := a.CallDedicated(t.Context(), forget); err != nil {
		t.Error(err)
	}
	if n := dialled.Load(); n != 2 {
		t.Errorf("dialled %d times, one for a call of its own", n)
	}
}

func TestAnAgentThatWasStartedAgainIsFound(t *testing.T) {
	var lost atomic.Int32
	g, a := connect(t, func() { lost.Add(1) })
	if err := a.CallIdempotent(t.Context(), forget); err != nil {
		t.Fatal(err)
	}
	g.SetThere(false)
	err := a.CallIdempotent(t.Context(), forget)
	if err == nil || !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no agent answers") {
		t.Errorf("without an agent: %v", err)
	}
	g.SetThere(true)
	if err := a.CallIdempotent(t.Context(), forget); err != nil {
		t.Error(err)
	}
	// It is told by a goroutine of its own.
	for deadline := time.Now().Add(20 * time.Second); lost.Load() == 0 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	if lost.Load() != 1 {
		t.Errorf("told %d times", lost.Load())
	}
}

func TestWaitConnect(t *testing.T) {
	t.Run("an agent that comes late", func(t *testing.T) {
		g, a := connect(t, nil)
		g.SetThere(false)
		done := make(chan error, 1)
		go func() { done <- a.WaitConnect(t.Context(), 0, nil) }()
		g.SetThere(true)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Run("one that has to be started, once", func(t *testing.T) {
		g, a := connect(t, nil)
		g.SetThere(false)
		n := 0
		err := a.WaitConnect(t.Context(), 0, func(context.Context) error {
			n++
			g.SetThere(true)
			return nil
		})
		if err != nil || n != 1 {
			t.Errorf("%v, started %d times", err, n)
		}
	})
	t.Run("one that is there is not started", func(t *testing.T) {
		_, a := connect(t, nil)
		err := a.WaitConnect(t.Context(), 0, func(context.Context) error { return errors.New("was started") })
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("one that cannot be started", func(t *testing.T) {
		g, a := connect(t, nil)
		g.SetThere(false)
		err := a.WaitConnect(t.Context(), 0, func(context.Context) error { return errors.New("no room") })
		if err == nil || !strings.Contains(err.Error(), "no room") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("one that never comes", func(t *testing.T) {
		g, a := connect(t, nil)
		g.SetThere(false)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		err := a.WaitConnect(ctx, 0, nil)
		if err == nil || !strings.Contains(err.Error(), "no agent answers") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("one of another protocol is not waited for", func(t *testing.T) {
		g, a := connect(t, nil)
		g.SetProtocol(api.ProtocolVersion + 1)
		var other *ProtocolError
		err := a.WaitConnect(t.Context(), 0, nil)
		if !errors.As(err, &other) || !errdefs.IsFailedPrecondition(err) {
			t.Errorf("got %v", err)
		}
	})
}

// ttrpc tells a server nothing of a caller that went away. The end of the
// connection does.
func TestTheAgentLearnsOfACallerThatGaveUp(t *testing.T) {
	g, a := connect(t, nil)
	reached, ended := make(chan struct{}), make(chan struct{})
	g.Before("Forget", func(ctx context.Context) error {
		close(reached)
		<-ctx.Done()
		close(ended)
		return ctx.Err()
	})
	gone := errors.New("the caller has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-reached
		cancel(gone)
	}()
	if err := a.CallDedicated(ctx, forget); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
	select {
	case <-ended:
	case <-time.After(waitLimit):
		t.Error("the agent keeps the call")
	}
	// The others' connection is whole.
	g.Before("Forget", nil)
	if err := a.CallIdempotent(t.Context(), forget); err != nil {
		t.Error(err)
	}
}

func TestTellDoesNotDial(t *testing.T) {
	g, a := connect(t, nil)
	if err := a.Notify(t.Context(), forget); err != nil || len(g.Calls()) != 0 {
		t.Errorf("%v, %q", err, g.Calls())
	}
	if err := a.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Notify(t.Context(), forget); err != nil || len(g.Calls()) != 1 {
		t.Errorf("%v, %q", err, g.Calls())
	}
}

func TestErrorsKeepTheirClass(t *testing.T) {
	g, a := connect(t, nil)
	g.Before("Forget", func(context.Context) error { return fmt.Errorf("plain: %w", net.ErrClosed) })
	if err := a.CallIdempotent(t.Context(), forget); err == nil || !strings.Contains(err.Error(), "plain") {
		t.Errorf("got %v", err)
	}
	g.Before("Forget", func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := a.CallIdempotent(ctx, forget); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestNoGuest(t *testing.T) {
	a := New(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(t.TempDir(), "none"))
	}, func() {})
	if err := a.Connect(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
	a.Close()
	if err := a.Connect(t.Context()); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// lateContext is past its deadline, and its timer has not fired yet.
type lateContext struct {
	context.Context
	fired <-chan struct{}
}

func (c lateContext) Done() <-chan struct{} { return c.fired }

func (c lateContext) Err() error {
	select {
	case <-c.fired:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// An agent that answers at the deadline is not the reason for the failure.
func TestFailureAtTheDeadline(t *testing.T) {
	passed, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	fired := make(chan struct{})
	got := make(chan error)
	answer := errors.New("the agent's answer")
	go func() { got <- failed(lateContext{passed, fired}, answer) }()
	select {
	case err := <-got:
		t.Fatalf("did not wait for the timer: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(fired)
	if err := <-got; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}

	if err := failed(t.Context(), answer); !errors.Is(err, answer) {
		t.Errorf("without a deadline: %v", err)
	}
	later, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if err := failed(later, answer); !errors.Is(err, answer) {
		t.Errorf("before the deadline: %v", err)
	}
}

func TestCompatible(t *testing.T) {
	for name, tc := range map[string]struct {
		agentOldest, agent, oldest, newest uint32
		want                               bool
	}{
		"the same release":                    {agentOldest: 2, agent: 3, oldest: 2, newest: 3, want: true},
		"an agent of the release before":      {agentOldest: 1, agent: 2, oldest: 2, newest: 3, want: true},
		"an agent of the release after":       {agentOldest: 3, agent: 4, oldest: 2, newest: 3, want: true},
		"an agent of two releases before":     {agentOldest: 1, agent: 1, oldest: 2, newest: 3},
		"an agent of two releases after":      {agentOldest: 4, agent: 5, oldest: 2, newest: 3},
		"an agent that names no oldest":       {agent: 2, oldest: 2, newest: 3, want: true},
		"a newer agent that names no oldest":  {agent: 4, oldest: 2, newest: 3},
		"an agent that names no version":      {oldest: 1, newest: 1},
		"an agent of the only version so far": {agentOldest: 1, agent: 1, oldest: 1, newest: 1, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			info := &api.InfoResponse{Protocol: tc.agent, OldestProtocol: tc.agentOldest}
			if got := compatible(info, tc.oldest, tc.newest); got != tc.want {
				t.Errorf("compatible(%v, %d, %d) = %t", info, tc.oldest, tc.newest, got)
			}
		})
	}
}
