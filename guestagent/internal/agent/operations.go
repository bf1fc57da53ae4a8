// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// operations lets one operation at a time work on a container. Those that are
// waiting, and those that are asked to make way, end with a context: nobody
// waits for one that cannot.
type operations struct {
	mu sync.Mutex
	// slots are by container ids: few, and gone with the VM.
	slots map[string]*slot
}

type slot struct {
	// taken has an element while an operation is in progress.
	taken chan struct{}
	// operation is the one in progress, or nil. It is guarded by the mutex of
	// operations.
	operation *operation
}

// operation is an operation in progress.
type operation struct {
	cancel context.CancelCauseFunc
	kind   operationKind
}

type operationKind int

const (
	// change is an operation that a Thaw waits for.
	change operationKind = iota
	// freezing is a Freeze: it may wait for a file system that does not answer,
	// and thaws what it has frozen when it is interrupted.
	freezing
	// dumping is a Checkpoint: its CRIU may be at work on the processes, which
	// cannot run before it has ended. It ends soon when it is interrupted.
	dumping
)

func (o *operations) slot(id string) *slot {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.slots == nil {
		o.slots = make(map[string]*slot)
	}
	s := o.slots[id]
	if s == nil {
		s = &slot{taken: make(chan struct{}, 1)}
		o.slots[id] = s
	}
	return s
}

// begin begins an operation on a container, once the one in progress has ended.
// The caller calls the function at its end, and works with the context, which
// is also done when the operation is interrupted.
func (o *operations) begin(ctx context.Context, id string, kind operationKind) (context.Context, func(), error) {
	s := o.slot(id)
	select {
	case s.taken <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("wait for the operation in progress on container %s: %w", id, context.Cause(ctx))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	o.mu.Lock()
	s.operation = &operation{cancel: cancel, kind: kind}
	o.mu.Unlock()
	return ctx, func() {
		o.mu.Lock()
		s.operation = nil
		o.mu.Unlock()
		<-s.taken
		cancel(nil)
	}, nil
}

// interrupt cancels the operation in progress on a container if it is of one of
// the kinds, and returns its kind, if there is one.
func (o *operations) interrupt(id string, cause error, kinds ...operationKind) (kind operationKind, found bool) {
	s := o.slot(id)
	o.mu.Lock()
	defer o.mu.Unlock()
	if s.operation == nil {
		return 0, false
	}
	if slices.Contains(kinds, s.operation.kind) {
		s.operation.cancel(cause)
	}
	return s.operation.kind, true
}

// complete calls done unless the operation of the context was interrupted,
// which is then the error. It is not interrupted meanwhile.
func (o *operations) complete(ctx context.Context, done func()) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	done()
	return nil
}
