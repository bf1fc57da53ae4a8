package task

import (
	"context"
	"testing"
)

// Every engine pauses before it checkpoints: an agent that has died is started
// again there, not only once the checkpoint comes.
func TestPauseStartsAnAgentThatHasDied(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.guest.SetThere(false)
	h.kata.Before("Create", func(context.Context) error {
		h.guest.SetThere(true)
		return nil
	})
	h.pause()
	if got := h.status(); got != "PAUSED" {
		t.Errorf("State says %s", got)
	}
}
