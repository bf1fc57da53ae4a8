// SPDX-License-Identifier: Apache-2.0

//go:build testhooks

package stopat

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
)

const (
	// Env names the directory for the processes on the host.
	Env = "KATA_CHECKPOINT_STOP_DIR"
	// reached is appended to a file's name when the operation arrives there.
	reached = ".reached"
	// pollInterval is the time between two checks of whether to continue.
	pollInterval = 5 * time.Millisecond
)

// Dir is a directory with a file for each phase to stop at. The zero Dir has
// none.
type Dir struct{ path string }

// In returns the directory of a path.
func In(path string) Dir { return Dir{path} }

// FromEnv returns the directory that the environment names.
func FromEnv() Dir { return Dir{os.Getenv(Env)} }

// Wait returns at once unless the directory has a file of the phase's name. It
// renames that to NAME.reached, and waits until it is removed or ctx ends.
func (d Dir) Wait(ctx context.Context, operation, phase string) {
	if d.path == "" {
		return
	}
	name := FileName(operation, phase)
	path := filepath.Join(d.path, name)
	if os.Rename(path, path+reached) != nil {
		return
	}
	log.G(ctx).WithField("phase", name).Warn("stopped by a test")
	for {
		if _, err := os.Lstat(path + reached); err != nil {
			return
		}
		select {
		case <-ctx.Done():
			os.Remove(path + reached)
			return
		case <-time.After(pollInterval):
		}
	}
}
