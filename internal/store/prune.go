// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Policy decides which checkpoints are kept. What is zero limits nothing.
type Policy struct {
	// Count is how many checkpoints of a container are kept, the newest.
	Count int
	// Age is how old one may be.
	Age time.Duration
	// Bytes is how large all together may be; the oldest go first.
	Bytes int64
}

// ErrNoPolicy is the error about a policy that limits nothing.
var ErrNoPolicy = errcode.Usage.Wrap(errors.New("nothing says which checkpoints to remove: give --keep-last, --older-than or --max-size"))

// Pruned is a checkpoint that a policy removes, and why.
type Pruned struct {
	*Checkpoint
	Reason string
}

// Prune returns what a policy removes of a list of checkpoints, the oldest
// first. Those with a .keep stay, and count.
func (p Policy) Prune(list []*Checkpoint, now time.Time) ([]Pruned, error) {
	if p.Count < 0 || p.Age < 0 || p.Bytes < 0 {
		return nil, errcode.Usage.Wrap(errors.New("a number, an age and a size have to be greater than 0"))
	}
	if p == (Policy{}) {
		return nil, ErrNoPolicy
	}
	reasons := map[*Checkpoint]string{}
	newest := map[string]int{} // by container, those that are newer
	var total int64
	for _, c := range slices.Backward(list) {
		total += c.Size
		of := c.Engine + "\x00" + c.Namespace + "\x00" + c.Of()
		if c.Damage != nil {
			of = ""
		}
		newer := newest[of]
		newest[of]++
		switch {
		case c.Keep || c.Damage != nil: // of which nobody knows how old it is
		case p.Count > 0 && newer >= p.Count:
			reasons[c] = fmt.Sprintf("there are %d newer ones of %s", newer, c.Of())
		case p.Age > 0 && now.Sub(c.Created) > p.Age:
			reasons[c] = fmt.Sprintf("it is %s old", now.Sub(c.Created).Round(time.Second))
		}
	}
	for c := range reasons {
		total -= c.Size
	}
	var out []Pruned
	for _, c := range list {
		reason := reasons[c]
		if reason == "" && p.Bytes > 0 && total > p.Bytes && !c.Keep && c.Damage == nil {
			reason = fmt.Sprintf("all together have %d bytes, more than %d", total, p.Bytes)
			total -= c.Size
		}
		if reason != "" {
			out = append(out, Pruned{c, reason})
		}
	}
	return out, nil
}
