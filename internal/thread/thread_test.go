// SPDX-License-Identifier: Apache-2.0

package thread

import (
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Go runs goroutines on the first thread as on any other, every now and then.
func TestDoLeavesTheFirstThreadAlone(t *testing.T) {
	for range 200 {
		var running sync.WaitGroup
		for range 10 {
			running.Go(func() {
				err := Do(func() error {
					if unix.Gettid() == unix.Getpid() {
						t.Error("on the first thread")
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		running.Wait()
	}
}

func TestDoAnswersTheError(t *testing.T) {
	want := errors.New("so")
	if err := Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}
