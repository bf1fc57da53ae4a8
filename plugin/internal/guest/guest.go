// SPDX-License-Identifier: Apache-2.0

// Package guest is the shim's connection to the agent in its guest. A shim has
// one guest and one [Agent] for it, which may be used before the VM exists, and
// which outlives a restart of the agent.
package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

const (
	// dialPause is the pause between two attempts to reach an agent that starts.
	dialPause = 20 * time.Millisecond
	// infoTimeout bounds the first answer on a new connection.
	infoTimeout = 5 * time.Second

	// The end of a connection that follows another end within shortLife is reported
	// after a pause, which doubles each time from lostPause to lostLimit: an agent
	// that hangs up again and again does not keep the host busy.
	shortLife = 10 * time.Second
	lostPause = time.Second
	lostLimit = time.Minute
)

// Dialer connects to the agent's port. It is called again for every attempt.
type Dialer func(ctx context.Context) (net.Conn, error)

// Agent is the agent of one guest. The zero value is not usable; see [New].
type Agent struct {
	dial  Dialer
	owner string
	lost  func()

	// sem is a mutex whose acquisition a context can cancel.
	sem  chan struct{}
	conn *connection

	mu sync.Mutex
	// pause is what the last report of a broken connection waited.
	pause time.Duration

	closed chan struct{}
	wg     sync.WaitGroup
}

// connection is alive until done is closed.
type connection struct {
	client *ttrpc.Client
	stream *strict
	agent  api.AgentService
	done   chan struct{}
}

// New returns the agent that dial connects to. Lost is called whenever an
// established connection has broken.
func New(dial Dialer, lost func()) *Agent {
	return &Agent{dial: dial, owner: rand.Text(), lost: lost, sem: make(chan struct{}, 1), closed: make(chan struct{})}
}

// Owner identifies this shim to the agent. Another process of the host, which
// could hold a lease, too, cannot guess it.
func (a *Agent) Owner() string { return a.owner }

// Close closes the connection. The guest thaws the containers that it owns.
func (a *Agent) Close() {
	close(a.closed)
	a.sem <- struct{}{}
	if a.conn != nil {
		a.conn.client.Close()
	}
	<-a.sem
	a.wg.Wait()
}

// Connect makes sure that there is a connection. It tries once.
func (a *Agent) Connect(ctx context.Context) error {
	_, err := a.connection(ctx)
	return err
}

// WaitConnect tries to connect until it succeeds or ctx ends. If no agent
// answers within grace and revive is not nil, it calls revive once, which
// starts the agent.
func (a *Agent) WaitConnect(ctx context.Context, grace time.Duration, revive func(context.Context) error) error {
	revival := time.After(grace)
	var last error
	for {
		err := a.Connect(ctx)
		if last != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) && !IsGone(err) {
			err = last // the cause, in place of the end of ctx
		}
		last = err
		var other *ProtocolError
		if err == nil || errors.As(err, &other) || errors.Is(err, errClosed) || errors.Is(err, ErrNoVM) {
			return err
		}
		if ctx.Err() != nil {
			return err
		}
		select {
		case <-revival:
			revival = nil
			if revive == nil {
				continue
			}
			if rerr := revive(ctx); rerr != nil {
				return errclass.Join(err, rerr)
			}
		case <-time.After(dialPause):
		case <-ctx.Done():
			return err
		}
	}
}

// ProtocolError is returned for an agent that has no version of the protocol in
// common with this shim.
type ProtocolError struct {
	Agent    string
	Protocol uint32
}

// Error implements error.
func (e *ProtocolError) Error() string {
	return fmt.Sprintf("the agent in the guest is version %s with protocol %d and this shim is version %s with protocol %d: install the guest bundle and the shim of the same release",
		e.Agent, e.Protocol, version.Version, api.ProtocolVersion)
}

// Unwrap gives the error its class.
func (e *ProtocolError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// goneError is the error of a call that no agent has answered.
type goneError struct{ error }

// Unwrap gives the error its class.
func (e goneError) Unwrap() error { return e.error }

// IsGone reports whether an error means that no agent has answered: one that
// answers and refuses returns errors of its own, of any class.
func IsGone(err error) bool {
	var gone goneError
	return errors.As(err, &gone)
}

// ErrNoVM is returned by a dialer when waiting for the VM is pointless.
var ErrNoVM = errcode.NoVM.Wrap(errors.New("its VM has ended"))

var errClosed = errclass.Unavailable(errcode.ShuttingDown, "the shim is shutting down")

// connection returns the live connection or makes one.
func (a *Agent) connection(ctx context.Context) (*connection, error) {
	select {
	case a.sem <- struct{}{}:
		defer func() { <-a.sem }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case <-a.closed:
		return nil, errClosed
	default:
	}
	if c := a.conn; c != nil {
		select {
		case <-c.done:
			a.conn = nil
		default:
			return c, nil
		}
	}
	c, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	info, err := c.info(ctx)
	if err != nil {
		c.client.Close()
		return nil, err
	}
	a.conn = c
	a.hold(c)
	log.G(ctx).WithFields(log.Fields{"agent": info.GetVersion(), "kernel": info.GetKernelRelease(), "boot": info.GetBootId()}).Info("connected to the agent in the guest")
	return c, nil
}

// open makes a connection without using it.
func (a *Agent) open(ctx context.Context) (*connection, error) {
	conn, err := a.dial(ctx)
	if err != nil {
		return nil, goneError{errclass.Unavailable(errcode.NoAgent, "no agent answers in the guest: %w", err)}
	}
	c := &connection{stream: newStrict(conn), done: make(chan struct{})}
	c.client = ttrpc.NewClient(c.stream, ttrpc.WithOnClose(func() { close(c.done) }), ttrpc.WithUnaryClientInterceptor(checkAnswers(c.stream.hangUp)))
	c.agent = api.NewAgentClient(c.client)
	return c, nil
}

func (c *connection) info(ctx context.Context) (*api.InfoResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	info, err := c.agent.Info(ctx, &api.InfoRequest{})
	if err != nil {
		return nil, goneError{errclass.Unavailable(errcode.AgentGone, "the agent in the guest does not answer: %w", c.native(err))}
	}
	if !compatible(info, api.OldestProtocol, api.ProtocolVersion) {
		return nil, errcode.AgentProtocol.Wrap(&ProtocolError{Agent: info.GetVersion(), Protocol: info.GetProtocol()})
	}
	return info, nil
}

// compatible reports whether an agent and a shim that speaks the versions from
// oldest to newest have one in common.
func compatible(agent *api.InfoResponse, oldest, newest uint32) bool {
	agentOldest := agent.GetOldestProtocol()
	if agentOldest == 0 {
		agentOldest = agent.GetProtocol()
	}
	return agentOldest <= newest && agent.GetProtocol() >= oldest
}

// hold keeps the agent's Hold call, our lease, open for as long as the
// connection lives, and calls lost when it has ended.
func (a *Agent) hold(c *connection) {
	begin := time.Now()
	a.wg.Go(func() {
		_, err := c.agent.Hold(context.Background(), &api.HoldRequest{Owner: a.owner})
		<-c.done
		log.L.WithError(err).Debug("connection to the agent in the guest closed")
		select {
		case <-a.closed:
			return
		case <-time.After(a.pauseAfter(time.Since(begin))):
		}
		select {
		case <-a.closed:
		default:
			a.lost()
		}
	})
}

// pauseAfter returns how long to wait before the end of a connection of this
// age is reported.
func (a *Agent) pauseAfter(age time.Duration) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.pause
	if age >= shortLife {
		now = 0
	}
	a.pause = min(max(2*now, lostPause), lostLimit)
	return now
}

// CallIdempotent makes a call that may reach the agent twice: it is repeated
// once on a new connection if the first was found broken.
func (a *Agent) CallIdempotent(ctx context.Context, call func(context.Context, api.AgentService) error) error {
	for attempt := 0; ; attempt++ {
		c, err := a.connection(ctx)
		if err != nil {
			return failed(ctx, err)
		}
		err = call(ctx, c.agent)
		if errors.Is(err, ttrpc.ErrClosed) && attempt == 0 {
			<-c.done
			continue
		}
		return failed(ctx, c.native(err))
	}
}

// Call makes a call that must not reach the agent twice.
func (a *Agent) Call(ctx context.Context, call func(context.Context, api.AgentService) error) error {
	c, err := a.connection(ctx)
	if err == nil {
		err = c.native(call(ctx, c.agent))
	}
	return failed(ctx, err)
}

// Notify makes a call if there is a connection, and does nothing otherwise.
func (a *Agent) Notify(ctx context.Context, call func(context.Context, api.AgentService) error) error {
	select {
	case a.sem <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	c := a.conn
	<-a.sem
	if c == nil {
		return nil
	}
	return c.native(call(ctx, c.agent))
}

// CallDedicated makes a long call on a connection of its own. When ctx is done
// the connection is closed, by which the agent notices: ttrpc passes a deadline
// on to the server, but no cancellation.
func (a *Agent) CallDedicated(ctx context.Context, call func(context.Context, api.AgentService) error) error {
	c, err := a.alone(ctx)
	if err == nil {
		err = c.native(call(ctx, c.agent))
		c.client.Close()
	}
	if err == nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return failed(ctx, err)
}

// failed returns the error of a call that was made with ctx, which is why ctx
// is done, if it is. The agent has the same deadline, and its answer may arrive
// before the timer of ctx has fired.
func failed(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// alone opens another connection beside the usual one, on which the version has
// been checked and Hold is open.
func (a *Agent) alone(ctx context.Context) (*connection, error) {
	if err := a.Connect(ctx); err != nil {
		return nil, err
	}
	return a.open(ctx)
}

// native restores the class of an error that the agent returned.
func (c *connection) native(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		if err = c.stream.violation(); err == nil {
			return goneError{errclass.Unavailable(errcode.AgentGone, "the agent in the guest is gone")}
		}
	}
	switch {
	case errors.As(err, new(violationError)):
		return errclass.With(errdefs.ErrUnavailable, errcode.AgentViolation.Wrap(err))
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	}
	return errclass.FromRPC(err)
}
