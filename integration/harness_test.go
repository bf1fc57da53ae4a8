package integration

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

const (
	// scenarioTimeout ends a scenario that waits for what does not come. Every wait of a scenario ends with it.
	scenarioTimeout = 4 * time.Minute
	// settleTimeout is for what goes away by itself once its container is removed.
	settleTimeout = 10 * time.Second
)

// scenario is one run of one scenario on one variant. Its methods fail the test rather than return errors.
type scenario struct {
	*testing.T
	ctx        context.Context
	testbed    *sharedTestbed
	engine     *engine.Engine
	events     *engine.Events
	ids        []string // of its containers
	pods       []*cri.Pod
	execs      int // that there have been
	start      time.Time
	logAt      int64          // containerd's log before this is of others
	afterwards []func() error // once the containers are removed, the last first
}

func newScenario(t *testing.T, beds *testbeds, v variant, limit time.Duration) *scenario {
	t.Helper()
	beds.lock(t, v)
	bed := beds.get(t, v)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	s := &scenario{T: t, ctx: ctx, testbed: bed, engine: bed.engine, events: bed.engine.Watch(ctx), start: time.Now()}
	if info, err := os.Stat(bed.ContainerdLog()); err == nil {
		s.logAt = info.Size()
	}
	t.Cleanup(func() {
		defer cancel()
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

// cleanUp removes the scenario's containers and checks that nothing is left of them.
func (s *scenario) cleanUp() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
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
	for _, undo := range slices.Backward(s.afterwards) {
		if err := undo(); err != nil {
			s.Error(err)
		}
	}
	if err := errors.Join(s.engine.RemoveCheckpoints(ctx), s.events.Close()); err != nil {
		s.Error(err)
	}
	var left []string
	for deadline := time.Now().Add(settleTimeout); ; {
		var err error
		if left, err = s.residue(ctx); err != nil {
			s.Error(err)
			return
		}
		if len(left) == 0 || time.Now().After(deadline) {
			break
		}
		time.Sleep(50 * time.Millisecond) //nolint:forbidigo // between two looks at what goes away by itself
	}
	for _, what := range left {
		s.Errorf("the scenario left %s", what)
	}
}

// residue lists what there is in containerd and on the machine that was not there before the scenario.
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

// storedObjects lists what a scenario may leave in a namespace of containerd's.
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
		// The CRI knows each image by its digest, too.
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

// afterContainers has the scenario undo something that its containers need.
func (s *scenario) afterContainers(undo func() error) { s.afterwards = append(s.afterwards, undo) }

// check fails the scenario if there is an error.
func (s *scenario) check(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// step notes in the test's log how long a part of the scenario took.
func (s *scenario) step(format string, args ...any) {
	s.Helper()
	now := time.Now()
	s.Logf("%6.2fs  %s", now.Sub(s.start).Seconds(), fmt.Sprintf(format, args...))
	s.start = now
}

// runTag is in the ids of all containers: another run of the scenarios may be under way on the machine, where Kata has one place for each id.
var runTag = hex.EncodeToString(random(2))

// id makes a container's id that no other scenario has.
func (s *scenario) id(name string) string {
	id := strings.NewReplacer("TestScenario/", "", "/", "-").Replace(s.Name()) + "-" + runTag + "-" + name
	s.ids = append(s.ids, id)
	s.testbed.ids = append(s.testbed.ids, id)
	return id
}

// dir makes a directory for image sets or volumes that goes with the scenario.
func (s *scenario) dir() string {
	s.Helper()
	dir, err := os.MkdirTemp(s.TempDir(), "")
	s.check(err)
	return dir
}

// withID makes a container the scenario's own, and one of the workload image.
func (s *scenario) withID(c engine.Container) engine.Container {
	c.ID, c.Image = s.id(c.ID), parts.WorkloadImageName
	return c
}

// create makes a container of the workload image.
func (s *scenario) create(c engine.Container) client.Container {
	s.Helper()
	container, err := s.engine.Create(s.ctx, s.withID(c))
	s.check(err)
	return container
}

// run starts a container.
func (s *scenario) run(c client.Container) *engine.Run {
	s.Helper()
	run, err := s.engine.Start(s.ctx, c)
	s.check(err)
	s.step("started %s", c.ID())
	return run
}

// checkpoint has the image set of a task written to a new directory.
func (s *scenario) checkpoint(run *engine.Run, exit bool) (dir string) {
	s.Helper()
	dir = s.dir()
	s.check(s.engine.CheckpointTo(s.ctx, run, dir, exit))
	s.step("checkpointed %s", run.ID())
	return dir
}

// restore starts a container from an image set.
func (s *scenario) restore(c client.Container, dir string) *engine.Run {
	s.Helper()
	run, err := s.engine.Restore(s.ctx, c, dir)
	s.check(err)
	s.step("restored %s", c.ID())
	return run
}

// waitExit waits for the end of a task, checks its exit status, and deletes it. All its output has arrived then.
func (s *scenario) waitExit(run *engine.Run, want uint32) {
	s.Helper()
	status, err := run.Exit(s.ctx)
	s.check(err)
	if status != want {
		s.Errorf("%s ended with status %d, not %d", run.ID(), status, want)
	}
	_, err = run.Delete(s.ctx)
	s.check(err)
}

// remove ends a container and removes it before the scenario's end.
func (s *scenario) remove(c client.Container) {
	s.Helper()
	s.check(s.engine.Remove(s.ctx, c.ID()))
	s.step("removed %s", c.ID())
}

// checkStatus checks a task's.
func (s *scenario) checkStatus(run *engine.Run, want client.ProcessStatus) {
	s.Helper()
	status, err := run.Status(s.ctx)
	s.check(err)
	if status.Status != want {
		s.Fatalf("%s is %s, not %s", run.ID(), status.Status, want)
	}
}

// checkExitEvents checks the exit statuses that containerd has reported of a container, one an event.
func (s *scenario) checkExitEvents(c client.Container, want ...uint32) {
	s.Helper()
	deadline := time.Now().Add(settleTimeout)
	for len(s.events.Exits(c.ID())) < len(want) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) //nolint:forbidigo // events come when they come
	}
	if have := s.events.Exits(c.ID()); !slices.Equal(have, want) {
		s.Errorf("%s: the exit events have the statuses %v, not %v", c.ID(), have, want)
	}
}

// waitNumbers waits until a workload has printed n numbers, and gives all that it has printed by then.
func (s *scenario) waitNumbers(out *engine.Output, parse func([]string) ([]int, error), n int) []int {
	s.Helper()
	var numbers []int
	s.check(out.Wait(s.ctx, func(lines []string) (bool, error) {
		var err error
		numbers, err = parse(lines)
		return len(numbers) >= n, err
	}))
	return numbers
}

// printedNumbers gives what a workload has printed.
func (s *scenario) printedNumbers(out *engine.Output, parse func([]string) ([]int, error)) []int {
	s.Helper()
	numbers, err := parse(out.Lines())
	s.check(err)
	return numbers
}

// checkConsecutive checks that numbers follow each other from first on, none lost and none doubled.
func (s *scenario) checkConsecutive(first int, numbers []int) {
	s.Helper()
	for i, n := range numbers {
		if n != first+i {
			s.Fatalf("after %v comes %d, not %d", numbers[max(0, i-3):i], n, first+i)
		}
	}
}

// bootID gives the id of the one kernel's boot that a task has run in.
func (s *scenario) bootID(run *engine.Run) string {
	s.Helper()
	boots := workload.Boots(run.Output.Lines())
	if len(boots) != 1 {
		s.Fatalf("%s was in the boots %v, not in one", run.ID(), boots)
	}
	return boots[0]
}

// checkOtherVM checks that a restored task runs in another VM than the first.
func (s *scenario) checkOtherVM(first, restored *engine.Run) {
	s.Helper()
	if a, b := s.bootID(first), s.bootID(restored); a == b {
		s.Errorf("restored in the same boot %s", a)
	}
}

// checkSilent checks that a task prints nothing for a second: a tenth of that is time for a workload's round.
func (s *scenario) checkSilent(out *engine.Output) {
	s.Helper()
	n := len(out.Lines())
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	if err := out.Wait(ctx, func(lines []string) (bool, error) { return len(lines) > n, nil }); err == nil {
		s.Errorf("went on with %q", out.Lines()[n:])
	}
}

// ctr runs containerd's command line tool.
func (s *scenario) ctr(args ...string) string {
	s.Helper()
	program := ""
	for dir := range strings.SplitSeq(s.testbed.Path, ":") {
		if path := filepath.Join(dir, "ctr"); program == "" && exec.Command(path, "--version").Run() == nil {
			program = path
		}
	}
	cmd := exec.CommandContext(s.ctx, program, args...)
	cmd.Env = append(os.Environ(), "CONTAINERD_ADDRESS="+s.testbed.Address, "CONTAINERD_NAMESPACE="+testbed.Namespace)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.Fatalf("ctr %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.Bytes())
	}
	s.step("ctr %s", strings.Join(args, " "))
	return string(out)
}

// configure changes the configuration of the shims that are started from now on, until the end of the scenario.
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
