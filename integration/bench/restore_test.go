// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// BenchmarkRestore compares a restore, up to the first line that the restored
// process prints, with what it cannot do without: a new container in a new VM, up
// to its first line, and a bare criu restore of a process of the same size, in that
// VM and from a directory of the host's. The image set is named by its path, so
// that containerd neither packs nor unpacks it.
func BenchmarkRestore(b *testing.B) {
	run(b, func(s *bench) error {
		for _, mib := range []int{16, 256} {
			volume := []specs.Mount{{Type: "bind", Source: b.TempDir(), Destination: bareVolume, Options: []string{"rbind", "rw"}}}
			dir := filepath.Join(s.bed.Dir, "tmp", fmt.Sprintf("restore-%d", mib))
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			id := fmt.Sprintf("restored-%d", mib)
			run, err := s.startOn(b.Context(), volume, id, pulseOf(mib)...)
			if err != nil {
				return err
			}
			if err := s.engine.CheckpointTo(b.Context(), run, dir, true); err != nil {
				return err
			}
			b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
				if err := s.restores(b, id, dir, volume, mib); err != nil {
					b.Fatal(err)
				}
			})
			if err := s.engine.Remove(b.Context(), id); err != nil {
				return err
			}
		}
		return nil
	})
}

func pulseOf(mib int) []string {
	return []string{"pulse", "--mib", strconv.Itoa(mib), "--every", "10ms"}
}

func (s *bench) restores(b *testing.B, id, dir string, volume []specs.Mount, mib int) error {
	ctx := b.Context()
	var cold, bare, restored []time.Duration
	phases := make(map[string][]time.Duration)
	for b.Loop() {
		if err := s.warm(2*mib + spareMiB); err != nil {
			return err
		}
		container, err := s.engine.Create(ctx, engine.Container{ID: "cold", Image: parts.WorkloadImageName, Args: append([]string{workload.Path}, pulseOf(0)...), Mounts: volume})
		if err != nil {
			return err
		}
		run, d, err := s.firstLine(ctx, container)
		if err != nil {
			return err
		}
		cold = append(cold, d)
		// The first Pause loads CRIU into the guest.
		if err := errors.Join(run.Pause(ctx), run.Resume(ctx)); err != nil {
			return err
		}
		if d, err = s.bareRestore(ctx, "cold", mib); err != nil {
			return err
		}
		bare = append(bare, d)
		if err := s.engine.Remove(ctx, "cold"); err != nil {
			return err
		}

		if container, err = s.engine.Client.LoadContainer(ctx, id); err != nil {
			return err
		}
		if err := s.engine.EndTask(ctx, container); err != nil {
			return err
		}
		log, err := os.Stat(s.bed.ContainerdLog())
		if err != nil {
			return err
		}
		if _, d, err = s.firstLine(ctx, container, client.WithRestoreImagePath(dir)); err != nil {
			return err
		}
		restored = append(restored, d)
		if err := s.restorePhases(id, log.Size(), phases); err != nil {
			return err
		}
	}
	both := make([]time.Duration, len(cold))
	for i := range cold {
		both[i] = cold[i] + bare[i]
	}
	b.ReportMetric(float64(median(restored)), "ns/op")
	b.ReportMetric(milliseconds(median(cold)), "cold-start-ms")
	b.ReportMetric(milliseconds(median(bare)), "bare-restore-ms")
	b.ReportMetric(ratio(restored, both), "restore/(cold+bare)")
	for _, name := range slices.Sorted(maps.Keys(phases)) {
		b.ReportMetric(milliseconds(median(phases[name])), strings.ReplaceAll(name, " ", "-")+"-ms")
	}
	return nil
}

// firstLine starts a container, and returns how long that took until it printed
// something.
func (s *bench) firstLine(ctx context.Context, container client.Container, opts ...client.NewTaskOpts) (*engine.Run, time.Duration, error) {
	begin := time.Now()
	run, err := s.engine.Start(ctx, container, opts...)
	if err != nil {
		return nil, 0, err
	}
	err = run.Output.Wait(ctx, func(lines []string) (bool, error) { return len(lines) > 0, nil })
	return run, time.Since(begin), err
}

// restorePhase is a line of the shim's for a phase of a restore.
var restorePhase = regexp.MustCompile(`msg=restore (?:bytes=\d+ )?container=(\S+) duration="?([^" ]+)"? .*?phase=(?:"([^"]+)"|(\S+))`)

// restorePhases adds the phases of the restore of a container. Log is where in the
// log it began.
func (s *bench) restorePhases(id string, log int64, phases map[string][]time.Duration) error {
	f, err := os.Open(s.bed.ContainerdLog())
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(log, io.SeekStart); err != nil {
		return err
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	found := 0
	for _, line := range restorePhase.FindAllStringSubmatch(string(data), -1) {
		if line[1] != id {
			continue
		}
		d, err := time.ParseDuration(line[2])
		if err != nil {
			return err
		}
		name := line[3] + line[4]
		phases[name] = append(phases[name], d)
		found++
	}
	if found < 2 {
		return fmt.Errorf("%d phases in the log of the restore of %s", found, id)
	}
	return nil
}

// bareRestoreScript dumps a process of its own in the guest's root to a volume of
// the container's, and restores it from there with nothing in the page cache, as it
// is in a new VM. Its program is a copy, because CRIU would look for the
// container's mounts.
const bareRestoreScript = `set -e
pid=$(busybox pidof workload)
dir=/proc/$pid/root%[1]s/images
work=/run/kata-checkpoint/bare
rm -rf $dir $work
mkdir $dir $work
export PATH=/run/kata-checkpoint/criu/bin:$PATH
cp /proc/$pid/root%[2]s $work/bare
busybox setsid $work/bare pulse --mib %[3]d --every 10ms </dev/null >$work/out 2>&1 &
until grep -q round $work/out 2>/dev/null; do busybox usleep 10000; done
bare=$(busybox pidof bare)
try() { "$@" || { tail -n 20 $work/log; exit 1; }; }
try criu dump -t $bare -D $dir -W $work -o log -v4 --manage-cgroups=ignore
busybox sync
echo 3 >/proc/sys/vm/drop_caches
read -r start _ </proc/uptime
try criu restore -D $dir -W $work -o log -v4 -d --manage-cgroups=ignore
read -r end _ </proc/uptime
kill -9 $bare
rm -rf $dir $work
echo $start $end
`

// bareRestore returns the duration of a bare restore in the VM of a container.
func (s *bench) bareRestore(ctx context.Context, id string, mib int) (time.Duration, error) {
	return s.timed(ctx, id, "restore", fmt.Sprintf(bareRestoreScript, bareVolume, workload.Path, mib))
}
