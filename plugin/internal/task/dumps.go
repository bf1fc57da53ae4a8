// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// maxDumps is how many dumps run at the same time at most.
	maxDumps = 64
	// longestTurn bounds how long a dump waits for others, one of which may hang.
	longestTurn = time.Minute
)

// dumps has the dumps of a sandbox's containers take turns, one for each of the
// guest's processors: CRIU computes for most of a dump, so that more at once take
// longer than one after the other, and each of their containers is frozen for as
// long as all take. A container that nobody has paused runs while it waits.
type dumps struct {
	once sync.Once
	// slots has maxDumps units, of which each dump takes its share of the
	// processors: their number grows while the VM runs.
	slots *semaphore.Weighted
}

// begin waits for a turn, and reports whether it had to. The dump takes place in
// any case. The caller calls end once or more often.
func (d *dumps) begin(ctx context.Context, processors uint32) (end func(), waited bool) {
	d.once.Do(func() { d.slots = semaphore.NewWeighted(maxDumps) })
	if processors == 0 {
		return func() {}, false // of an agent of an earlier release
	}
	share := int64(maxDumps / min(processors, maxDumps))
	end = sync.OnceFunc(func() { d.slots.Release(share) })
	if d.slots.TryAcquire(share) {
		return end, false
	}
	ctx, cancel := context.WithTimeout(ctx, quarter(ctx, longestTurn))
	defer cancel()
	if d.slots.Acquire(ctx, share) != nil {
		return func() {}, true
	}
	return end, true
}
