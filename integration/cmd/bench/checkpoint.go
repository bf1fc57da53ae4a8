package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
)

// checkpoints compares the checkpoints of containers of two sizes with bare dumps of the same processes to the same file system.
func (b *bench) checkpoints(ctx context.Context) error {
	for _, size := range []struct {
		mib   int
		bound float64
	}{{16, 1.6}, {256, 1.25}} {
		id := fmt.Sprintf("memory-%d", size.mib)
		// It verifies its memory once in a while only: a guest with one processor measures the dump, not the workload.
		run, err := b.start(ctx, id, "memory", "--mib", strconv.Itoa(size.mib), "--shm-mib", "0", "--every", "3s")
		if err != nil {
			return err
		}
		if err := b.sized(ctx, run, size.mib, size.bound); err != nil {
			return err
		}
		if err := b.engine.Remove(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) sized(ctx context.Context, run *engine.Run, mib int, bound float64) error {
	var whole, inner, bare []time.Duration
	var last *sample
	// The first of each is not counted: it brings CRIU into the guest's memory. What one leaves in the guest's and the host's caches the other finds:
	// they take turns in coming first.
	for i := range b.runs + 1 {
		var d time.Duration
		turns := []func() error{
			func() (err error) { last, err = b.checkpoint(ctx, run, i); return err },
			func() (err error) { d, err = b.bareDump(ctx, run.ID(), last.externals); return err },
		}
		if i%2 == 1 {
			slices.Reverse(turns)
		}
		for _, turn := range turns {
			if err := b.warm(2*mib + spareMiB); err != nil {
				return err
			}
			if err := turn(); err != nil {
				return err
			}
		}
		if i > 0 {
			whole, inner, bare = append(whole, last.whole), append(inner, last.call), append(bare, d)
		}
	}
	t := b.table
	t.heading(fmt.Sprintf("checkpoint of %d MiB of random memory, %d times, left running", mib, b.runs))
	t.row("image set", "%.1f MiB in %d files", float64(last.size)/(1<<20), last.files)
	t.bounded("written by the guest, over its size", "%.2f", float64(last.guest)/float64(last.size), 1.05)
	t.bounded("written by the shim, over its size", "%.2f", float64(last.shim)/float64(last.size), 1.05)
	t.row("pause, checkpoint, resume", "%.0f ms, of which the checkpoint %.0f ms", milliseconds(median(whole)), milliseconds(median(inner)))
	t.row("bare criu dump", "%.0f ms", milliseconds(median(bare)))
	t.bounded(fmt.Sprintf("checkpoint of %d MiB over a bare dump", mib), "%.2f", float64(median(whole))/float64(median(bare)), bound)
	return nil
}

const (
	// spareMiB is what else a sample needs of the page cache, generously.
	spareMiB = 128
	// warmPasses bounds how often memory is used before a sample.
	warmPasses = 6
)

// warm has the machine use memory for files and free it again, until that gets no faster. Where a hypervisor takes the free memory of a virtual machine
// back (free page reporting), the first use of a page costs many times what the next does. A checkpoint, which leaves a copy, would pay for twice the
// pages of a bare dump, and on a machine without that neither would.
func (b *bench) warm(mib int) error {
	if b.cold {
		return nil
	}
	last := time.Duration(math.MaxInt64)
	for range warmPasses {
		d, err := b.useMemory(mib)
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

// useMemory writes a file, removes it, and returns the time that the writing took.
func (b *bench) useMemory(mib int) (time.Duration, error) {
	f, err := os.CreateTemp(filepath.Join(b.bed.Dir, "tmp"), "warm-")
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

// sample is one checkpoint.
type sample struct {
	dir         string
	whole, call time.Duration
	guest, shim int64 // bytes written
	size        int64
	files       int
	externals   string // CRIU's options for what of the container is not to be dumped
}

// Names of the processes that write: the guest's files are written by the virtiofsd that shares them.
const (
	virtiofsd = "testbed-virtiofsd"
	shim      = "containerd-shim-kata-checkpoint-v2"
)

// checkpoint makes an image set by the calls of `ctr task checkpoint --image-path`, without that command's images of the file system.
func (b *bench) checkpoint(ctx context.Context, run *engine.Run, i int) (*sample, error) {
	s := &sample{dir: filepath.Join(b.bed.Dir, "tmp", fmt.Sprintf("%s-%d", run.ID(), i))}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, err
	}
	options, err := typeurl.MarshalAnyToProto(&runcoptions.CheckpointOptions{ImagePath: s.dir})
	if err != nil {
		return nil, err
	}
	guest, err := b.bed.BytesWritten(virtiofsd)
	if err != nil {
		return nil, err
	}
	host, err := b.bed.BytesWritten(shim)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := run.Pause(ctx); err != nil {
		return nil, err
	}
	paused := time.Now()
	if _, err := b.engine.Client.TaskService().Checkpoint(ctx, &tasks.CheckpointTaskRequest{ContainerID: run.ID(), Options: options}); err != nil {
		return nil, err
	}
	s.call = time.Since(paused)
	if err := run.Resume(ctx); err != nil {
		return nil, err
	}
	s.whole = time.Since(start)
	if s.guest, err = b.bed.BytesWritten(virtiofsd); err != nil {
		return nil, err
	}
	if s.shim, err = b.bed.BytesWritten(shim); err != nil {
		return nil, err
	}
	s.guest -= guest
	s.shim -= host
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		s.size += info.Size()
		s.files++
	}
	if s.externals, err = externals(s.dir); err != nil {
		return nil, err
	}
	return s, os.RemoveAll(s.dir)
}

// bareScript dumps the container's processes from the guest's root to the directory that the shim's image sets go through, by the same CRIU. The
// times are of the guest's clock, in hundredths of a second.
const bareScript = `set -e
pid=$(busybox pidof workload)
dir=/run/kata-checkpoint/exchange/%[1]s/bare
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

// externals takes from an image set what of the container is not to be dumped.
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

// bareDump gives the time of a bare dump, with options of CRIU's.
func (b *bench) bareDump(ctx context.Context, id, options string) (time.Duration, error) {
	out, status, err := b.bed.GuestExec(ctx, id, fmt.Sprintf(bareScript, id, options))
	if err != nil {
		return 0, err
	}
	if status != 0 {
		return 0, fmt.Errorf("bare criu dump: status %d:\n%s", status, out)
	}
	var start, end float64
	if _, err := fmt.Sscan(string(out), &start, &end); err != nil {
		return 0, fmt.Errorf("bare criu dump: %w: %q", err, out)
	}
	return time.Duration((end - start) * float64(time.Second)), nil
}
