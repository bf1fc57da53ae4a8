// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
)

// BenchmarkCheckpoint compares checkpoints of containers of two sizes with bare
// dumps of the same processes to the same file system.
func BenchmarkCheckpoint(b *testing.B) {
	run(b, func(s *bench) error {
		for _, size := range []struct {
			mib   int
			bound float64
		}{{16, 1.6}, {256, 1.25}} {
			id := fmt.Sprintf("memory-%d", size.mib)
			// It rarely verifies its memory: in a guest with one processor the
			// dump is to be measured, not the workload.
			volume := specs.Mount{Type: "bind", Source: b.TempDir(), Destination: bareVolume, Options: []string{"rbind", "rw"}}
			run, err := s.startOn(b.Context(), []specs.Mount{volume}, id, "memory", "--mib", strconv.Itoa(size.mib), "--shm-mib", "0", "--every", "3s")
			if err != nil {
				return err
			}
			b.Run(fmt.Sprintf("%dMiB", size.mib), func(b *testing.B) {
				if err := s.sized(b, run, size.mib, size.bound); err != nil {
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

func (s *bench) sized(b *testing.B, run *engine.Run, mib int, bound float64) error {
	var whole, durable, disk, inner, bare []time.Duration
	var last *sample
	pair := func(i int) error {
		var d time.Duration
		// What one leaves in the guest's and the host's caches is there for the
		// other: they take turns in coming first.
		turns := []func() error{
			func() (err error) { last, err = s.checkpoint(b.Context(), run, i); return err },
			func() (err error) { d, err = s.bareDump(b.Context(), run.ID(), last.externals); return err },
		}
		if i%2 == 1 {
			slices.Reverse(turns)
		}
		for _, turn := range turns {
			if err := s.warm(2*mib + spareMiB); err != nil {
				return err
			}
			if err := turn(); err != nil {
				return err
			}
		}
		if i > 0 {
			whole, inner, bare = append(whole, last.whole-last.disk), append(inner, last.call), append(bare, d)
			durable, disk = append(durable, last.whole), append(disk, last.disk)
		}
		return nil
	}
	// The first pair is not counted: it brings CRIU into the guest's memory.
	if err := pair(0); err != nil {
		return err
	}
	for i := 1; b.Loop(); i++ {
		if err := pair(i); err != nil {
			return err
		}
	}
	b.ReportMetric(float64(median(durable)), "ns/op")
	b.ReportMetric(milliseconds(median(disk)), "disk-ms")
	b.ReportMetric(ratio(durable, bare), "durable/bare")
	b.ReportMetric(milliseconds(median(inner)), "call-ms")
	b.ReportMetric(milliseconds(median(bare)), "bare-dump-ms")
	b.ReportMetric(float64(last.size)/(1<<20), "image-MiB")
	s.bounds.check(b, ratio(whole, bare), "whole/bare", bound)
	s.bounds.check(b, float64(last.guest)/float64(last.size), "guest-written/size", 1.05)
	s.bounds.check(b, float64(last.shim)/float64(last.size), "shim-written/size", 1.05)
	return nil
}

const (
	// spareMiB is a generous allowance for a sample's other use of the page
	// cache.
	spareMiB = 128
	// warmPasses is the maximum number of passes of warm before a sample.
	warmPasses = 6
)

// warm faults the machine's memory in, by writing files and removing them until
// that gets no faster. On a VM whose hypervisor reclaims free memory (free page
// reporting), the first use of a page costs many times as much as the next. A
// checkpoint, which leaves a copy, would pay for twice the pages of a bare
// dump.
func (s *bench) warm(mib int) error {
	if *cold {
		return nil
	}
	last := time.Duration(math.MaxInt64)
	for range warmPasses {
		d, err := s.useMemory(mib)
		if err != nil {
			return err
		}
		if d > last/5*4 {
			break
		}
		last = d
	}
	return nil
}

// useMemory writes a file and removes it, and returns how long the write took.
func (s *bench) useMemory(mib int) (time.Duration, error) {
	f, err := os.CreateTemp(filepath.Join(s.bed.Dir, "tmp"), "warm-")
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 1<<20)
	start := time.Now()
	for range mib {
		if _, err = f.Write(buf); err != nil {
			break
		}
	}
	d := time.Since(start)
	return d, errors.Join(err, os.Remove(f.Name()), f.Close())
}

// sample is a measured checkpoint.
type sample struct {
	dir         string
	whole, call time.Duration
	disk        time.Duration // of whole, the wait for the disk
	guest, shim int64         // bytes written
	size        int64
	externals   string // CRIU's options for external mounts
}

// Names of the processes that write: virtiofsd writes the guest's files.
const (
	virtiofsd = "testbed-virtiofsd"
	shim      = "containerd-shim-kata-checkpoint-v2"
)

// checkpoint creates an image set with the calls of `ctr task checkpoint
// --image-path`, but without that command's image of the root file system.
func (s *bench) checkpoint(ctx context.Context, run *engine.Run, i int) (*sample, error) {
	taken := &sample{dir: filepath.Join(s.bed.Dir, "tmp", fmt.Sprintf("%s-%d", run.ID(), i))}
	if err := os.Mkdir(taken.dir, 0o700); err != nil {
		return nil, err
	}
	options, err := typeurl.MarshalAnyToProto(&runcoptions.CheckpointOptions{ImagePath: taken.dir})
	if err != nil {
		return nil, err
	}
	guest, err := s.bed.BytesWritten(virtiofsd)
	if err != nil {
		return nil, err
	}
	host, err := s.bed.BytesWritten(shim)
	if err != nil {
		return nil, err
	}
	log, err := os.Stat(s.bed.ContainerdLog())
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := run.Pause(ctx); err != nil {
		return nil, err
	}
	paused := time.Now()
	if _, err := s.engine.Client.TaskService().Checkpoint(ctx, &tasks.CheckpointTaskRequest{ContainerID: run.ID(), Options: options}); err != nil {
		return nil, err
	}
	taken.call = time.Since(paused)
	if err := run.Resume(ctx); err != nil {
		return nil, err
	}
	taken.whole = time.Since(start)
	if taken.disk, err = s.waitedForDisk(run.ID(), log.Size()); err != nil {
		return nil, err
	}
	if taken.guest, err = s.bed.BytesWritten(virtiofsd); err != nil {
		return nil, err
	}
	if taken.shim, err = s.bed.BytesWritten(shim); err != nil {
		return nil, err
	}
	taken.guest -= guest
	taken.shim -= host
	entries, err := os.ReadDir(taken.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		taken.size += info.Size()
	}
	if taken.externals, err = externals(taken.dir); err != nil {
		return nil, err
	}
	return taken, os.RemoveAll(taken.dir)
}

// diskPhase is a line of the shim's for a phase in which it waits for the disk.
var diskPhase = regexp.MustCompile(`msg=checkpoint container=(\S+) duration="?([^" ]+)"? phase=(sync|commit)\b`)

// waitedForDisk returns how long the checkpoint of a container waited for the
// disk, which depends on the disk and not on the dump. Log is where in the log it
// began.
func (s *bench) waitedForDisk(id string, log int64) (total time.Duration, err error) {
	f, err := os.Open(s.bed.ContainerdLog())
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, err := f.Seek(log, io.SeekStart); err != nil {
		return 0, err
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return 0, err
	}
	found := 0
	for _, line := range diskPhase.FindAllStringSubmatch(string(data), -1) {
		if line[1] != id {
			continue
		}
		d, err := time.ParseDuration(line[2])
		if err != nil {
			return 0, err
		}
		total += d
		found++
	}
	if found != 2 {
		return 0, fmt.Errorf("%d of 2 phases in the log of the checkpoint of %s", found, id)
	}
	return total, nil
}

// bareVolume is where a container has a directory of the host for bare dumps: the
// guest can write to the exchange directory during a checkpoint only.
const bareVolume = "/bare"

// bareScript dumps the container's processes from the guest's root to a volume of
// the container's, with the same CRIU. Times are from the guest's clock, in
// hundredths of a second.
const bareScript = `set -e
pid=$(busybox pidof workload)
dir=/proc/$pid/root%[1]s/images
work=/run/kata-checkpoint/bare
rm -rf $dir $work
mkdir $dir $work
export PATH=/run/kata-checkpoint/criu/bin:$PATH # CRIU writes tmpfs mounts with GNU tar
read -r start _ </proc/uptime
criu dump -t $pid -D $dir -W $work -o log -v4 --leave-running --manage-cgroups=ignore --network-lock nftables %[2]s ||
  { tail -n 20 $work/log; exit 1; }
read -r end _ </proc/uptime
rm -rf $dir $work
echo $start $end
`

// externals returns CRIU's options for the external mounts in an image set.
func externals(dir string) (string, error) {
	data, err := os.ReadFile(filepath.Join(dir, "kata-checkpoint.json"))
	if err != nil {
		return "", err
	}
	var manifest struct {
		Externals []struct {
			Name        string `json:"name"`
			Destination string `json:"destination"`
		} `json:"externals"`
	}
	if err := json.Unmarshal(data, &manifest); err != nil {
		return "", err
	}
	var out strings.Builder
	for _, e := range manifest.Externals {
		fmt.Fprintf(&out, " --external 'mnt[%s]:%s'", e.Destination, e.Name)
	}
	return out.String(), nil
}

// bareDump returns the duration of a bare dump with CRIU options.
func (s *bench) bareDump(ctx context.Context, id, options string) (time.Duration, error) {
	return s.timed(ctx, id, "dump", fmt.Sprintf(bareScript, bareVolume, options))
}

// timed runs a script in the guest of a container that prints the times in seconds
// at which something of CRIU began and ended.
func (s *bench) timed(ctx context.Context, id, what, script string) (time.Duration, error) {
	out, status, err := s.bed.GuestExec(ctx, id, script)
	if err != nil {
		return 0, err
	}
	if status != 0 {
		return 0, fmt.Errorf("bare criu %s: status %d:\n%s", what, status, out)
	}
	var start, end float64
	if _, err := fmt.Sscan(string(out), &start, &end); err != nil {
		return 0, fmt.Errorf("bare criu %s: %w: %q", what, err, out)
	}
	return time.Duration((end - start) * float64(time.Second)), nil
}
