// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// Limits, for [paced] and what calls it.
const (
	// scenarioTimeout ends a scenario that waits in vain: all its waits end
	// then.
	scenarioTimeout = 4 * time.Minute
	// settleTimeout is for what disappears on its own after its container.
	settleTimeout = 10 * time.Second
	// answerTimeout is for the answer to a call whose helper was killed, and
	// for the end of a task whose VM was.
	answerTimeout = time.Minute
	// cleanUpTimeout is for the removal of all that a scenario has made.
	cleanUpTimeout = 2 * time.Minute
)

// scenario is one run of one scenario on one variant. Its methods fail the test
// instead of returning errors.
//
// The verbs:
//
//   - create, run, checkpoint, restore, remove: what an engine does with a
//     container. startPod and runPod make a sandbox, as the engine's client and
//     as the CRI; create on a pod and runIn put containers into it.
//   - shell runs a script in a container and returns the lines it prints;
//     startExec and createExec leave an exec running, or not yet started.
//   - Whatever begins with wait returns when it has happened: waitNumbers (a
//     workload has counted so far), waitLine, waitExit, waitExecExit. It ends
//     with the scenario's time.
//   - Whatever begins with check looks now, and fails the scenario if it is not
//     so: checkConsecutive (no number is lost or doubled), checkOtherVM,
//     checkKeepsRunning, checkRefused, checkExitEvents, ... check itself is for
//     errors.
//   - printedNumbers, bootID, archiveEntries and the like return what there is.
//   - eventually polls a condition for which nobody sends a signal.
//   - afterContainers, configure and newDir set up what goes away with the
//     scenario; step logs how long a part of it took.
type scenario struct {
	*testing.T
	ctx       context.Context
	testbed   *sharedTestbed
	engine    *engine.Engine
	events    *engine.Events
	ids       []string // of its containers
	pods      []*cri.Pod
	execs     int       // started so far
	lastStep  time.Time // when it ended
	logStart  int64     // of containerd's log, what is before belongs to others
	afterward []func() error
}

func newScenario(t *testing.T, beds *testbeds, v variant, limit time.Duration) *scenario {
	t.Helper()
	bed := beds.get(t, v)
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), paced(limit))
	s := &scenario{T: t, ctx: ctx, testbed: bed, engine: bed.engine, events: bed.engine.Watch(ctx), lastStep: begin}
	if info, err := os.Stat(bed.ContainerdLog()); err == nil {
		s.logStart = info.Size()
	}
	t.Cleanup(func() {
		defer cancel()
		defer func() { noteTime(t.Name(), time.Since(begin)) }()
		if t.Failed() {
			s.attachLogs()
			if os.Getenv(keepEnv) != "" {
				beds.leave(v)
				t.Logf("the testbed stays up: testbed down --dir %s", bed.Dir)
				return
			}
		}
		s.cleanUp()
		if t.Failed() {
			beds.down(t, v) // what is wrong with it must not fail the next scenario
		}
	})
	return s
}

// cleanUp removes the scenario's containers and checks that nothing of them is
// left.
func (s *scenario) cleanUp() {
	ctx, cancel := context.WithTimeout(context.Background(), paced(cleanUpTimeout))
	defer cancel()
	for _, pod := range s.pods {
		if err := pod.Remove(ctx); err != nil {
			s.Error(err)
		}
	}
	for _, id := range slices.Backward(s.ids) { // a pod's sandbox after its containers
		if err := s.engine.Remove(ctx, id); err != nil {
			s.Error(err)
		}
	}
	for _, undo := range slices.Backward(s.afterward) {
		if err := undo(); err != nil {
			s.Error(err)
		}
	}
	if err := errors.Join(s.engine.RemoveCheckpoints(ctx), s.events.Close()); err != nil {
		s.Error(err)
	}
	var left []string
	var err error
	poll(ctx, paced(settleTimeout), func() bool {
		left, err = s.residue(ctx)
		return err != nil || len(left) == 0
	})
	if err != nil {
		s.Error(err)
	}
	for _, what := range left {
		s.Errorf("the scenario left %s", what)
	}
}

// residue lists what there is in containerd and on the machine that was not
// there before the scenario.
func (s *scenario) residue(ctx context.Context) ([]string, error) {
	left, err := s.testbed.Residue(s.ids...)
	if err != nil {
		return nil, err
	}
	spaces := []string{testbed.Namespace}
	if s.testbed.cri != nil {
		spaces = append(spaces, testbed.CRINamespace)
	}
	for _, space := range spaces {
		stored, err := s.storedObjects(namespaces.WithNamespace(ctx, space))
		if err != nil {
			return nil, err
		}
		left = append(left, stored...)
	}
	return left, nil
}

// storedObjects lists what a scenario may have left in one of containerd's
// namespaces.
func (s *scenario) storedObjects(ctx context.Context) (left []string, err error) {
	containers, err := s.engine.Client.Containers(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range containers {
		left = append(left, "container "+c.ID())
	}
	images, err := s.engine.Client.ListImages(ctx)
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		name := image.Name()
		// The CRI also knows each image by its digest.
		if !slices.Contains([]string{testbed.Image, testbed.PauseImage, parts.WorkloadImageName}, name) && !strings.HasPrefix(name, "sha256:") {
			left = append(left, "image "+name)
		}
	}
	err = s.engine.Client.SnapshotService("").Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindActive {
			left = append(left, "snapshot "+info.Name)
		}
		return nil
	})
	return left, err
}

// afterContainers has something undone that the scenario's containers need,
// once they are removed. The last is undone first.
func (s *scenario) afterContainers(undo func() error) { s.afterward = append(s.afterward, undo) }

// check fails the scenario if there is an error.
func (s *scenario) check(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// step logs how long a part of the scenario took.
func (s *scenario) step(format string, args ...any) {
	s.Helper()
	now := time.Now()
	s.Logf("%6.2fs  %s", now.Sub(s.lastStep).Seconds(), fmt.Sprintf(format, args...))
	s.lastStep = now
}

// runTag is in the IDs of all containers: scenarios may be running on this
// machine in another process, and Kata has one place for each ID.
var runTag = hex.EncodeToString(random(2))

func random(n int) []byte {
	out := make([]byte, n)
	_, _ = rand.Read(out) // never fails
	return out
}

// fileName is the scenario's name, fit to be part of a file's or a container's.
func (s *scenario) fileName() string {
	return strings.NewReplacer("TestScenario/", "", "/", "-").Replace(s.Name())
}

// id makes an ID that no container of another scenario has.
func (s *scenario) id(name string) string {
	id := s.fileName() + "-" + runTag + "-" + name
	s.adopt(id)
	return id
}

// adopt makes a container the scenario's: it is removed with it.
func (s *scenario) adopt(id string) {
	s.ids = append(s.ids, id)
	s.testbed.ids = append(s.testbed.ids, id)
}

// newDir makes a directory for image sets or volumes that goes away with the
// scenario.
func (s *scenario) newDir() string {
	s.Helper()
	dir, err := os.MkdirTemp(s.TempDir(), "")
	s.check(err)
	return dir
}

// configure changes the configuration of the shims that are started from now
// on, until the end of the scenario.
func (s *scenario) configure(key string, value any) {
	s.Helper()
	path := filepath.Join(s.testbed.Dir, "kata-checkpoint.toml")
	data, err := os.ReadFile(path)
	s.check(err)
	var settings map[string]any
	s.check(toml.Unmarshal(data, &settings))
	settings[key] = value
	changed, err := toml.Marshal(settings)
	s.check(err)
	s.check(os.WriteFile(path, changed, 0o644))
	s.Cleanup(func() {
		if err := os.WriteFile(path, data, 0o644); err != nil {
			s.Error(err)
		}
	})
}
