// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// afterDump is the phase that follows the dump: the shim copies the images.
const afterDump = "checkpoint-copy-images"

// shmCounter counts in /dev/shm only, which is part of the image set.
func shmCounter(name string) []string {
	return []string{workload.Path, "counter", "--file", "/dev/shm/" + name + ".file", "--shm", "/dev/shm/" + name}
}

// earlyThaw: where the user says that the writable layer does not matter, and
// where the engine's root file system cannot be written to, a container runs on
// right after the dump, while State reports it as paused; its image set is of the
// instant of the dump. Everywhere else it is frozen until the Resume: a file that
// would change right after the dump is not in the diff.
func earlyThaw(s *scenario) {
	s.diffIsOfTheDump()
	s.runsOnAfterTheDump()
	s.runsOnInAPod()
}

// diffIsOfTheDump has a container checkpointed whose writable layer the engine
// reads after the dump.
func (s *scenario) diffIsOfTheDump() {
	s.Helper()
	spec := counter("late")
	spec.Annotations = map[string]string{annotations.AfterKey: annotations.LeaveRunning}
	c := s.create(spec)
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 5)
	at, made := 0, make(chan client.Image, 1)
	s.whileAt(afterDump, func() error {
		image, err := run.Checkpoint(s.ctx)
		made <- image
		return err
	}, func() {
		s.checkSilent(run.Output)
		s.checkStatus(run, client.Paused)
		at = len(s.printedNumbers(run.Output, workload.Ticks))
	})
	image := <-made
	// It is stored before it is printed.
	if n, err := strconv.Atoi(s.inDiff(image, "var/tmp/count")); err != nil || n != at && n != at+1 {
		s.Errorf("the diff has the number %d (%v), and the container had counted to %d", n, err, at)
	}
	s.check(s.engine.RemoveCheckpoints(s.ctx))
	s.checkConsecutive(1, s.waitNumbers(run.Output, workload.Ticks, at+5))
	s.remove(c)
	s.step("the diff is of the instant of the dump")
}

// runsOnAfterTheDump has a container checkpointed whose user has allowed it.
func (s *scenario) runsOnAfterTheDump() {
	s.Helper()
	c := s.create(engine.Container{ID: "early", Args: shmCounter("early"), Annotations: map[string]string{annotations.ThawKey: annotations.AfterDump}})
	run := s.run(c)
	earliest := len(s.waitNumbers(run.Output, workload.Ticks, 5))
	dir := s.newDir()
	latest := 0
	s.whileAt(afterDump, func() error { return s.engine.CheckpointTo(s.ctx, run, dir, false) }, func() {
		latest = len(s.printedNumbers(run.Output, workload.Ticks))
		s.checkStatus(run, client.Paused)
		s.checkConsecutive(1, s.waitNumbers(run.Output, workload.Ticks, latest+10))
		s.shell(run, "true")
		s.checkStatus(run, client.Paused)
	})
	s.checkStatus(run, client.Running)
	s.checkConsecutive(1, s.waitNumbers(run.Output, workload.Ticks, latest+20))

	// Nobody would resume a container that the user has paused.
	s.check(run.Pause(s.ctx))
	s.check(s.engine.CheckpointTo(s.ctx, run, s.newDir(), false))
	s.checkSilent(run.Output)
	s.checkStatus(run, client.Paused)
	s.check(run.Resume(s.ctx))
	s.checkKeepsCounting(run)
	s.remove(c)

	again := s.create(engine.Container{ID: "again", Args: shmCounter("early")})
	restored := s.restore(again, dir)
	after := s.waitNumbers(restored.Output, workload.Ticks, 5)
	if at := after[0] - 1; at < earliest || at > latest {
		s.Errorf("the restored counter continues after %d; it was dumped between %d and %d", at, earliest, latest)
	}
	s.checkConsecutive(after[0], after)
	s.checkOtherVM(run, restored)
	s.remove(again)
	s.step("ran on after the dump")
}

// runsOnInAPod has the CRI checkpoint a container with a read-only root.
func (s *scenario) runsOnInAPod() {
	s.Helper()
	pod := s.runPod("early", cri.PodSpec{})
	spec := cri.ContainerSpec{Name: "c", Args: shmCounter("c"), ReadOnlyRoot: true}
	c := s.runIn(pod, spec)
	earliest, latest := len(s.waitTicks(c, 5)), 0
	archive := s.archive("early")
	s.whileAt(afterDump, func() error { return c.Checkpoint(s.ctx, archive) }, func() {
		latest = len(s.waitTicks(c, 5))
		s.checkConsecutive(1, s.waitTicks(c, latest+10))
	})
	s.check(pod.Remove(s.ctx))
	pod = s.runPod("again", cri.PodSpec{Annotations: fromArchive(archive)})
	s.checkContinuesBetween(s.runIn(pod, spec), earliest, latest)
	s.step("ran on after the dump, in a pod")
}

// whileAt does something while an operation of the shim's is stopped at a phase,
// and waits for its end.
func (s *scenario) whileAt(phase string, operation func() error, do func()) {
	s.Helper()
	s.stopAt(phase)
	answer := make(chan error, 1)
	go func() { answer <- operation() }()
	s.waitStoppedAt(phase, answer)
	do()
	s.check(os.Remove(filepath.Join(s.testbed.StopDir(), phase+".reached")))
	s.check(<-answer)
}

// inDiff is the content of a file in the diff of a checkpoint's image.
func (s *scenario) inDiff(image client.Image, name string) string {
	s.Helper()
	store := s.engine.Client.ContentStore()
	data, err := content.ReadBlob(s.ctx, store, image.Target())
	s.check(err)
	var index ocispec.Index
	s.check(json.Unmarshal(data, &index))
	for _, m := range index.Manifests {
		if !images.IsLayerType(m.MediaType) {
			continue
		}
		blob, err := store.ReaderAt(s.ctx, m)
		s.check(err)
		defer blob.Close()
		plain, err := compression.DecompressStream(content.NewReader(blob))
		s.check(err)
		defer plain.Close()
		for r := tar.NewReader(plain); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			s.check(err)
			if strings.TrimPrefix(h.Name, "./") != name {
				continue
			}
			text, err := io.ReadAll(r)
			s.check(err)
			return strings.TrimSpace(string(text))
		}
	}
	s.Fatalf("there is no %s in the diff", name)
	return ""
}
