// SPDX-License-Identifier: Apache-2.0

//go:build testhooks

package stopat

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestWaitStopsWhereAFileSaysSo(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "checkpoint-save-devshm")
	for title, release := range map[string]func(cancel func()){
		"the file is removed": func(func()) { os.Remove(name + ".reached") },
		"the operation ends":  func(cancel func()) { cancel() },
	} {
		t.Run(title, func(t *testing.T) {
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			In(dir).Wait(ctx, "checkpoint", "freeze") // another phase
			done := make(chan struct{})
			go func() {
				defer close(done)
				In(dir).Wait(ctx, "checkpoint", "save /dev/shm")
			}()
			for {
				if _, err := os.Lstat(name + ".reached"); err == nil {
					break
				}
				if ctx.Err() != nil {
					t.Fatal("the phase is not reached")
				}
				time.Sleep(time.Millisecond) //nolint:forbidigo // between two looks at a file
			}
			select {
			case <-done:
				t.Fatal("it did not wait")
			default:
			}
			release(cancel)
			<-done
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestWaitDoesNothingUnlessAsked(t *testing.T) {
	In("").Wait(t.Context(), "checkpoint", "freeze")
	In(t.TempDir()).Wait(t.Context(), "checkpoint", "freeze")
}
