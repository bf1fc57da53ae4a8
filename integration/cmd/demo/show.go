package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/screen"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

const (
	id = "counter"
	// few is how many numbers are counted in each VM.
	few = 12
)

// show is one run of the demonstration.
type show struct {
	*screen.Screen
	kata string

	bed       *testbed.Testbed
	release   func()
	engine    *engine.Engine
	images    string // directory of the image set
	container client.Container
	first     *engine.Run
	second    *engine.Run
	files     int // of the image set
	size      int64
}

func (s *show) run(ctx context.Context) (err error) {
	start := time.Now()
	p, err := parts.Find()
	if err != nil {
		return err
	}
	dir := p.Build("demo")
	defer func() {
		// Also after ^C: nothing is left behind.
		if s.bed != nil {
			down := s.Step("take everything down again", time.Second, func() error { return s.down(context.WithoutCancel(ctx)) })
			err = errors.Join(err, down)
		}
		if err == nil {
			err = s.explain()
		}
		if err == nil {
			s.Print("All of it took %.0f s, and nothing is left of it.", time.Since(start).Seconds())
		}
	}()
	s.Print("\nA container that counts moves from one virtual machine to another, by a checkpoint and a restore.\n")
	for _, step := range []struct {
		title string
		usual time.Duration
		do    func(context.Context) error
	}{
		{"start a containerd whose runtime is kata-checkpoint", 2 * time.Second, func(ctx context.Context) error { return s.up(ctx, p, dir) }},
		{"start the container, in a VM of its own", 8 * time.Second, s.start},
		{fmt.Sprintf("let it count to %d", few), 2 * time.Second, s.count},
		{"checkpoint it, and end it and its VM", 5 * time.Second, s.checkpoint},
		{"restore it, in a second VM", 12 * time.Second, s.restore},
		{"let it count on", 2 * time.Second, s.countOn},
	} {
		if err := s.Step(step.title, step.usual, func() error { return step.do(ctx) }); err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
	}
	s.files, s.size, err = sizeOf(s.images)
	return err
}

func (s *show) up(ctx context.Context, p *parts.Parts, dir string) error {
	image, err := p.WorkloadImage(ctx, p.Bin("workload"), workload.Path)
	if err != nil {
		return err
	}
	if s.bed, s.release, err = testbed.UpAlone(ctx, testbed.Options{Dir: dir, Kata: s.kata}); err != nil {
		return err
	}
	if err := s.bed.Import(ctx, image); err != nil {
		return err
	}
	c, err := s.bed.Client()
	if err != nil {
		return err
	}
	s.engine = &engine.Engine{Client: c, Runtime: testbed.Runtime, FIFOs: filepath.Join(s.bed.Dir, "tmp/fifos")}
	s.images = filepath.Join(s.bed.Dir, "tmp/checkpoint")
	return os.MkdirAll(s.images, 0o700)
}

func (s *show) start(ctx context.Context) (err error) {
	s.container, err = s.engine.Create(ctx, engine.Container{ID: id, Image: parts.WorkloadImageName, Args: []string{workload.Path, "counter"}})
	if err != nil {
		return err
	}
	s.first, err = s.engine.Start(ctx, s.container)
	return err
}

func (s *show) count(ctx context.Context) error { return counted(ctx, s.first, few) }

func (s *show) countOn(ctx context.Context) error { return counted(ctx, s.second, few) }

// counted waits until there are so many numbers.
func counted(ctx context.Context, run *engine.Run, n int) error {
	return run.Output.Wait(ctx, func(lines []string) (bool, error) {
		ticks, err := workload.Ticks(lines)
		return len(ticks) >= n, err
	})
}

func (s *show) checkpoint(ctx context.Context) error {
	if err := s.engine.CheckpointTo(ctx, s.first, s.images, true); err != nil {
		return err
	}
	if _, err := s.first.Exit(ctx); err != nil {
		return err
	}
	_, err := s.first.Delete(ctx)
	return err
}

func (s *show) restore(ctx context.Context) (err error) {
	s.second, err = s.engine.Restore(ctx, s.container, s.images)
	return err
}

func (s *show) down(ctx context.Context) error {
	defer s.release()
	var err error
	if s.engine != nil {
		err = s.engine.Remove(ctx, id)
		s.engine.Client.Close()
	}
	return errors.Join(err, s.bed.Down(ctx))
}

// explain shows the numbers of both VMs side by side and says what happened.
func (s *show) explain() error {
	before, after := s.first.Output.Lines(), s.second.Output.Lines()
	left, err := workload.Ticks(before)
	if err != nil {
		return err
	}
	right, err := workload.Ticks(after)
	if err != nil {
		return err
	}
	s.table(before, after)
	if right[0] != left[len(left)-1]+1 {
		return fmt.Errorf("after %d should come %d, and came %d", left[len(left)-1], left[len(left)-1]+1, right[0])
	}
	s.Print(`What happened
  The container ran in a VM with a kernel of its own, as Kata has it. Its number was in the memory of its process, in a file of
  its root file system, in /dev/shm, and it printed it. The checkpoint froze it, wrote its processes to %d files of %.1f MiB
  altogether, and ended it; its VM ended with it. The restore started a second VM, as the two boot ids show, and put the
  processes into it: same container for containerd, same files, same memory.
  The last number in the first VM was %d; the first one in the second VM is %d. Nothing was lost, nothing was done twice.

Try it yourself
  eval "$(bin/testbed up --dir /var/tmp/testbed)"
  ctr run -d --runtime "$RUNTIME" docker.io/library/busybox:latest one sh -c 'while sleep 1; do echo $((i+=1)) >/tmp/count; done'
  ctr container checkpoint --image --task --rw one checkpoint:one
  ctr task rm -f one
  ctr container restore --live --rw two checkpoint:one
  ctr task exec --exec-id look two cat /tmp/count
  bin/testbed down --dir /var/tmp/testbed
`, s.files, float64(s.size)/(1<<20), left[len(left)-1], right[0])
	return nil
}

// table prints the ends of the first VM's lines beside the beginnings of the second's.
func (s *show) table(before, after []string) {
	const rows = 6
	numbers := func(lines []string) (out []string) {
		for _, line := range lines {
			if strings.HasPrefix(line, "tick ") {
				out = append(out, line)
			}
		}
		return out
	}
	left, right := numbers(before), numbers(after)
	left, right = left[max(0, len(left)-rows):], right[:min(rows, len(right))]
	const row = "  %-44s| %s"
	rule := strings.Repeat("-", 45)
	s.Print("")
	s.Print(row, "in the first VM, up to the checkpoint", "in the second VM, from the restore on")
	s.Print("  %s+%s", rule[:44], rule)
	s.Print(row, "boot "+workload.Boots(before)[0], "boot "+workload.Boots(after)[0])
	for _, line := range left {
		s.Print(row, line, "")
	}
	for _, line := range right {
		s.Print(row, "", line)
	}
	s.Print("")
}

func sizeOf(dir string) (files int, size int64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, 0, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return 0, 0, err
		}
		size += info.Size()
	}
	return len(entries), size, nil
}
