// Package stopat holds an operation at one of its phases, so that a test can
// kill something there. The shim and the guest's agent ask at the end of each
// phase; unless somebody has put a file into a directory that only root can
// write, nothing happens.
package stopat

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
)

// reached is added to a file's name when the operation has arrived there.
const reached = ".reached"

// Dir is the directory with a file for each phase to stop at; the empty Dir
// has none.
type Dir string

// Wait returns at once unless the directory has a file of the phase's name. It
// renames that to NAME.reached, and waits until it is removed or ctx ends.
func (d Dir) Wait(ctx context.Context, operation, phase string) {
	if d == "" {
		return
	}
	name := FileName(operation, phase)
	path := filepath.Join(string(d), name)
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
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// FileName is what the file for a phase is called: operation "checkpoint" and
// phase "save /dev/shm" make checkpoint-save-devshm.
func FileName(operation, phase string) string {
	return operation + "-" + strings.NewReplacer(" ", "-", "/", "").Replace(phase)
}
