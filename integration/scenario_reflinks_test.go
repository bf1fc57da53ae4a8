// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// reflinks: where state_dir and the image set are on one file system with
// reflinks, the shim writes next to nothing of an image that the guest has
// written: at most two percent of it. Elsewhere it writes all.
func reflinks(s *scenario) {
	const (
		mib  = 64
		most = 0.02
	)
	for _, mkfs := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1"}, {"mkfs.btrfs", "-q"}} {
		kind := strings.TrimPrefix(mkfs[0], "mkfs.")
		s.Run(kind, func(t *testing.T) {
			one := s.sub(t)
			dir := s.newFS(mkfs, kind)
			sets := filepath.Join(dir, "sets")
			one.check(os.Mkdir(sets, 0o700))
			one.configure("state_dir", filepath.Join(dir, "state"))
			c := s.create(engine.Container{ID: kind, Args: []string{workload.Path, "memory", "--mib", strconv.Itoa(mib), "--shm-mib", "0", "--every", "500ms"}})
			run := one.run(c)
			one.waitNumbers(run.Output, workload.Rounds, 1)
			written := func(set string, stop bool) (ratio float64) {
				before := one.bytesWritten(c.ID(), "containerd-shim-kata-checkpoint-v2")
				one.check(s.engine.CheckpointTo(s.ctx, run, set, stop))
				manifest := one.readManifest(set)
				size := manifest.Bytes()
				if size < mib<<20 {
					one.Fatalf("an image set of a process with %d MiB has %d bytes", mib, size)
				}
				ratio = float64(one.bytesWritten(c.ID(), "containerd-shim-kata-checkpoint-v2")-before) / float64(size)
				one.step("the shim has written %.4f of %d MiB to %s", ratio, size>>20, set)
				return ratio
			}
			if ratio := written(one.newDir(), false); ratio < 0.9 {
				one.Errorf("to another file system the shim has written %.4f of an image set: what is measured is not what it writes", ratio)
			}
			set := filepath.Join(sets, "set")
			one.check(os.Mkdir(set, 0o700))
			if ratio := written(set, true); ratio > most {
				one.Errorf("the shim has written %.4f of an image set, which is more than %.2f", ratio, most)
			}
			one.waitExit(run, 137)
			before := one.printedNumbers(run.Output, workload.Rounds)
			restored := one.restore(c, set)
			one.checkConsecutive(1, append(before, one.waitNumbers(restored.Output, workload.Rounds, 2)...))
			one.remove(c) // by the shim that has this configuration
		})
	}
}

// newFS is a directory on a new file system, in a file of its own, until the
// scenario's containers are removed.
func (s *scenario) newFS(mkfs []string, kind string) string {
	s.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-"+kind+"-")
	s.check(err)
	image, mounted := dir+".img", false
	s.afterContainers(func() error {
		if mounted {
			if err := unix.Unmount(dir, 0); err != nil {
				return fmt.Errorf("unmount %s: %w", dir, err)
			}
		}
		if err := os.Remove(image); err != nil {
			return err
		}
		return os.Remove(dir)
	})
	s.check(os.WriteFile(image, nil, 0o600))
	s.check(os.Truncate(image, 1<<30))
	for _, args := range [][]string{append(mkfs, image), {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.CommandContext(s.ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			s.Fatalf("%s: %v: %s", args[0], err, out)
		}
	}
	mounted = true
	return dir
}
