// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"filippo.io/age"
	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// operator is the operator's tool, with the testbed's configuration.
type operator struct {
	*scenario
	program string
}

// operator returns the tool. Its checkpoints go away with the scenario.
func (s *scenario) operator() *operator {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	s.afterContainers(func() error { return os.RemoveAll(filepath.Join(s.testbed.Dir, "state/checkpoints")) })
	return &operator{s, p.Bin("kata-checkpoint")}
}

// command is a call of the tool.
func (o *operator) command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(slices.Clone(args), "--config", o.testbed.OwnConfig())
	switch args[0] {
	case "create", "restore", "pod":
		args = append(args, "--address", o.testbed.Address)
	}
	return exec.CommandContext(ctx, o.program, args...)
}

// try runs the tool and returns what it prints to stdout and stderr.
func (o *operator) try(args ...string) (stdout, stderr string, status int) {
	o.Helper()
	cmd := o.command(o.ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		o.Fatal(err)
	}
	o.step("kata-checkpoint %s", strings.Join(args, " "))
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must runs the tool, which succeeds, and returns its stdout.
func (o *operator) must(args ...string) string {
	o.Helper()
	stdout, stderr, status := o.try(args...)
	if status != 0 {
		o.Fatalf("kata-checkpoint %s: status %d\n%s%s", strings.Join(args, " "), status, stdout, stderr)
	}
	return stdout
}

// mustJSON is must for the answer in JSON.
func (o *operator) mustJSON(into any, args ...string) {
	o.Helper()
	out := o.must(append(args, "--json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		o.Fatalf("kata-checkpoint %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// checkFails runs the tool, which fails with a word of why.
func (o *operator) checkFails(why string, args ...string) {
	o.Helper()
	if stdout, stderr, status := o.try(args...); status != 2 || !strings.Contains(stdout+stderr, why) {
		o.Errorf("kata-checkpoint %s: status %d, which does not say %q: %s%s", strings.Join(args, " "), status, why, stdout, stderr)
	}
}

// waitFile waits until a file has n numbers of a counter, and returns all.
func (o *operator) waitFile(path string, n int) (numbers []int) {
	o.Helper()
	if !o.eventually(settleTimeout, func() bool {
		data, err := os.ReadFile(path)
		if err != nil {
			return false
		}
		lines := strings.Split(string(data), "\n")
		numbers, err = workload.Ticks(lines[:len(lines)-1])
		o.check(err)
		return len(numbers) >= n
	}) {
		o.Fatalf("%s has the numbers %v, not %d", path, numbers, n)
	}
	return numbers
}

// shown is what inspect prints.
type shown struct {
	Name, Container, Engine, Trust string
	Stopped                        bool
	Bytes                          struct{ Total, Memory int64 }
	Processes                      []struct {
		PID  int
		Name string
	}
	Differences []string
	Phases      []struct{ Name string }
}

// checkInspect checks what inspect shows of a checkpoint.
func (o *operator) checkInspect(name, engineName string, stopped bool) {
	o.Helper()
	var i shown
	o.mustJSON(&i, "inspect", name)
	if i.Engine != engineName || i.Stopped != stopped || i.Trust != "trusted" || i.Bytes.Memory == 0 || i.Bytes.Total <= i.Bytes.Memory ||
		len(i.Processes) != 1 || i.Processes[0].Name != "workload" || len(i.Differences) == 0 || len(i.Phases) < 3 {
		o.Errorf("inspect shows %+v", i)
	}
	for line := range strings.Lines(o.must("inspect", name)) {
		if len(line) > 81 {
			o.Errorf("a line of inspect is longer than 80 columns: %s", line)
		}
	}
}

// cliLife: the operator's tool checkpoints, shows and restores containers of
// ctr, nerdctl and the CRI, by the names that these have for them.
func cliLife(s *scenario) {
	o := s.operator()
	log := filepath.Join(s.newDir(), "log")

	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)
	o.must("create", c.ID(), "one", "--leave-running")
	s.checkKeepsRunning(first)
	o.checkFails("there is a checkpoint of this name already", "create", c.ID(), "one")
	o.checkFails("the container is running, and only one that does not run", "restore", "one")
	s.checkKeepsRunning(first)
	var stats struct {
		Podman     int64 `json:"podman_checkpoint_duration"`
		Containers []struct {
			ID      string `json:"Id"`
			Runtime int64  `json:"runtime_checkpoint_duration"`
			CRIU    struct {
				Frozen int64 `json:"frozen_time"`
				Pages  int64 `json:"pages_written"`
			} `json:"criu_statistics"`
		} `json:"container_statistics"`
	}
	// By the beginning of its ID, and stopped.
	s.check(json.Unmarshal([]byte(o.must("create", c.ID(), "two", "--print-stats")), &stats))
	if len(stats.Containers) != 1 || stats.Containers[0].ID != c.ID() || stats.Containers[0].Runtime <= 0 || stats.Podman < stats.Containers[0].Runtime ||
		stats.Containers[0].CRIU.Frozen == 0 || stats.Containers[0].CRIU.Pages == 0 {
		s.Errorf("the statistics are %+v", stats)
	}
	before := s.printedNumbers(first.Output, workload.Ticks)
	o.checkInspect("one", "containerd", false)
	o.checkInspect("two", "containerd", true)
	o.must("restore", "two", "--log", "file://"+log)
	after := o.waitFile(log, 5)
	s.checkConsecutive(1, append(before, after...))
	printed, err := os.ReadFile(log)
	s.check(err)
	if boots := workload.Boots(strings.Split(string(printed), "\n")); len(boots) != 1 || boots[0] == s.bootID(first) {
		s.Errorf("restored in the boots %v, after %s", boots, s.bootID(first))
	}
	s.checkExecIn(c)
	// The first is of an earlier instant: what it had in files comes back with it.
	s.check(s.engine.EndTask(s.ctx, c))
	s.check(os.Remove(log))
	o.must("restore", "one", "--log", "file://"+log)
	again := o.waitFile(log, 3)
	if again[0] > before[len(before)-1] {
		s.Errorf("continues with %d, after %d", again[0], before[len(before)-1])
	}
	s.checkConsecutive(again[0], again)
	// And in a container of its own.
	id := s.id("new")
	other := log + "-new"
	o.must("restore", "two", "--new", id, "--log", "file://"+other)
	fresh := o.waitFile(other, 3)
	s.checkConsecutive(before[len(before)-1]+1, fresh)
	s.checkDiffs(o)
	s.remove(c)
	s.check(s.engine.Remove(s.ctx, id))

	n := s.nerdctl()
	n.container("run", "counter", "-d", "--net", "none", parts.WorkloadImageName, workload.Path, "counter")
	n.waitCount("counter", 5)
	o.must("create", "counter", "nerd")
	n.checkCounter("exited 137")
	o.checkInspect("nerd", "nerdctl", true)
	o.must("restore", "nerd")
	n.checkCounter("running 0")
	n.waitCount("counter", n.waitCount("counter", 5)+5)
	if out := n.mustRun("exec", "counter", "cat", "/proc/1/comm"); out != "workload" {
		s.Errorf("the restored container prints %q", out)
	}
	n.mustRun("rm", "-f", "counter")

	pod := s.runPod("web", cri.PodSpec{})
	k := s.runIn(pod, counterNamed("c"))
	s.waitTicks(k, 5)
	o.must("create", podNamespace+"/web/c", "pod1")
	at := s.waitTicks(k, 5)
	s.checkConsecutive(1, s.waitTicks(k, len(at)+5))
	o.checkInspect("pod1", "cri", false)
	s.check(pod.Remove(s.ctx))
	var answer struct {
		Annotations map[string]string
		Archives    []string
	}
	o.mustJSON(&answer, "restore", "pod1")
	s.afterContainers(func() error { return os.Remove(answer.Archives[0]) })
	pod = s.runPod("again", cri.PodSpec{Annotations: answer.Annotations})
	k = s.runIn(pod, counterNamed("c"))
	now := s.waitTicks(k, 3)
	if now[0] < 5 || now[0] > at[len(at)-1]+5 {
		s.Errorf("continues with %d, and had %d about the checkpoint", now[0], len(at))
	}
	s.checkConsecutive(now[0], now)
	s.checkInPod(k, "again")

	var list []struct{ Name string }
	o.mustJSON(&list, "ls")
	var names []string
	for _, l := range list {
		names = append(names, l.Name)
	}
	if !slices.Equal(names, []string{"one", "two", "nerd", "pod1"}) {
		s.Errorf("ls has %v", names)
	}
	o.must("keep", "two")
	o.checkFails("is to be kept", "rm", "one", "two")
	if out := o.must("prune", "--keep-last", "1", "--dry-run"); !strings.Contains(out, "one: ") || strings.Contains(out, "two: ") {
		s.Errorf("prune says %q", out)
	}
	o.must("prune", "--keep-last", "1")
	o.checkFails("there is no such checkpoint", "inspect", "one")
	o.must("rm", "--force", "two", "nerd", "pod1")
	if out := o.must("ls"); strings.Count(out, "\n") != 1 {
		s.Errorf("ls has %q after all were removed", out)
	}
}

// checkExecIn checks that an exec works in a container that another program has
// started.
func (s *scenario) checkExecIn(c client.Container) {
	s.Helper()
	task, err := c.Task(s.ctx, nil)
	s.check(err)
	run := &engine.Run{Task: task, Output: engine.NewOutput()}
	if out := s.shell(run, "cat /proc/1/comm"); !slices.Equal(out, []string{"workload"}) {
		s.Errorf("an exec prints %q", out)
	}
}

// checkDiffs checks what diff shows of a counter's two checkpoints.
func (s *scenario) checkDiffs(o *operator) {
	s.Helper()
	out, _, status := o.try("diff", "one", "two")
	if status != 1 || !strings.Contains(out, "~ file /var/tmp/count: ") || strings.Contains(out, "process") {
		s.Errorf("diff: status %d: %s", status, out)
	}
}

// podOneInstant: two containers of a pod that count, each in a place of its own
// in memory that they share, are checkpointed in one instant: neither has a
// number that the other lacks. The restored pair agrees.
func podOneInstant(s *scenario) {
	o := s.operator()
	slots := func(name string, slot int) cri.ContainerSpec {
		return cri.ContainerSpec{Name: name, Args: []string{workload.Path, "slots", "--every", "5ms", "--slot", fmt.Sprint(slot), "--own", "/dev/shm/" + name}}
	}
	pod := s.runPod("pair", cri.PodSpec{})
	a, b := s.runIn(pod, slots("a", 0)), s.runIn(pod, slots("b", 1))
	rounds := func(c *cri.Container, n int) (out []int) {
		s.check(c.Wait(s.ctx, func(lines []string) (bool, error) {
			var err error
			out, err = workload.Rounds(lines)
			return len(out) >= n, err
		}))
		return out
	}
	rounds(a, 20)
	rounds(b, 20)
	var made []struct {
		Name, Group string
		Stopped     bool
	}
	o.mustJSON(&made, "pod", podNamespace+"/pair", "pair")
	if len(made) != 2 || made[0].Name != "pair-a" || made[1].Name != "pair-b" || made[0].Group != "pair" || made[0].Stopped || made[1].Stopped {
		s.Fatalf("made %+v", made)
	}
	s.checkConsecutive(1, rounds(a, len(rounds(a, 1))+10))
	s.checkConsecutive(1, rounds(b, len(rounds(b, 1))+10))
	s.check(pod.Remove(s.ctx))

	var answer struct {
		Annotations map[string]string
		Archives    []string
	}
	o.mustJSON(&answer, "restore", "pair")
	s.afterContainers(func() error { return errors.Join(os.Remove(answer.Archives[0]), os.Remove(answer.Archives[1])) })
	pod = s.runPod("restored", cri.PodSpec{Annotations: answer.Annotations})
	// The workload ends if the other's number decreases, or its own is not the one
	// that it remembers.
	a, b = s.runIn(pod, slots("a", 0)), s.runIn(pod, slots("b", 1))
	atA, atB := rounds(a, 20), rounds(b, 20)
	s.checkConsecutive(atA[0], atA)
	s.checkConsecutive(atB[0], atB)
	if atA[0] == 1 || atB[0] == 1 {
		s.Errorf("they begin with %d and %d", atA[0], atB[0])
	}
	o.must("rm", "pair")
	if out := o.must("ls", "--json"); strings.TrimSpace(out) != "[]" {
		s.Errorf("there is %s", out)
	}
}

// exportOthersReadIt: checkpointctl shows what is exported, in each
// compression, of a container of ctr's and of a pod's; a pod is restored from
// an export, and what is imported is what was exported.
func exportOthersReadIt(s *scenario) {
	o := s.operator()
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 2)
	o.must("create", c.ID(), "plain", "--leave-running")
	pod := s.runPod("web", cri.PodSpec{})
	k := s.runIn(pod, counterNamed("c"))
	s.waitTicks(k, 5)
	o.must("create", "web/c", "inpod")
	dir := s.newDir()
	for _, compression := range []string{"zstd", "gzip", "none"} {
		for name, want := range map[string][]string{"plain": {"containerd", c.ID()}, "inpod": {"containerd", "c"}} {
			file := filepath.Join(dir, name+"."+compression)
			o.must("export", name, file, "--compress", compression)
			for _, tc := range []struct{ args, want []string }{
				{[]string{"show", file}, append(want, "workload")},
				{[]string{"inspect", file, "--ps-tree"}, []string{"Process tree", "workload"}},
				{[]string{"inspect", file, "--stats"}, []string{"CRIU dump statistics", "Pages written"}},
				{[]string{"inspect", file, "--mounts"}, []string{"Overview of mounts", "/dev/shm"}},
			} {
				out := s.checkpointctl(tc.args...)
				for _, w := range tc.want {
					if !strings.Contains(out, w) {
						s.Errorf("checkpointctl %s says nothing of %q: %s", fmt.Sprint(tc.args), w, out)
					}
				}
			}
		}
	}
	o.must("import", filepath.Join(dir, "inpod.gzip"), "back")
	if out, _, status := o.try("diff", "inpod", "back"); status != 0 {
		s.Errorf("what is imported differs: %s", out)
	}
	// One that the CRI has written, too.
	theirs := s.archive("theirs")
	s.check(k.Checkpoint(s.ctx, theirs))
	o.must("import", theirs, "theirs")
	o.must("verify", "theirs", "back")
	o.checkInspect("theirs", "cri", false)
	s.check(pod.Remove(s.ctx))

	// As a pod is restored from any archive.
	archive := s.archive("zstd")
	data, err := os.ReadFile(filepath.Join(dir, "inpod.zstd"))
	s.check(err)
	s.check(os.WriteFile(archive, data, 0o600))
	pod = s.runPod("again", cri.PodSpec{Annotations: fromArchive(archive)})
	now := s.waitTicks(s.runIn(pod, counterNamed("c")), 3)
	if now[0] < 5 {
		s.Errorf("continues with %d", now[0])
	}
	s.checkConsecutive(now[0], now)
}

// encryptedExport: an export for an age recipient has nothing of the container
// that can be read, and is imported by whoever has the identity, and nobody
// else.
func encryptedExport(s *scenario) {
	o := s.operator()
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)
	o.must("create", c.ID(), "one")
	before := s.printedNumbers(first.Output, workload.Ticks)
	dir := s.newDir()
	mine, err := age.GenerateX25519Identity()
	s.check(err)
	theirs, err := age.GenerateX25519Identity()
	s.check(err)
	key, other := filepath.Join(dir, "key"), filepath.Join(dir, "other")
	s.check(os.WriteFile(key, []byte(mine.String()+"\n"), 0o600))
	s.check(os.WriteFile(other, []byte(theirs.String()+"\n"), 0o600))
	file := filepath.Join(dir, "one.tar.age")
	o.must("export", "one", file, "--compress", "none", "--recipient", mine.Recipient().String())
	data, err := os.ReadFile(file)
	s.check(err)
	for _, clear := range []string{"inventory.img", c.ID(), "kata-checkpoint.json"} {
		if bytes.Contains(data, []byte(clear)) {
			s.Errorf("%q can be read in the archive", clear)
		}
	}
	o.checkFails("it is encrypted: give the file with your age identity", "import", file, "two")
	o.checkFails("it is encrypted for others", "import", file, "two", "--identity", other)
	o.must("rm", "one")
	o.must("import", file, "two", "--identity", key)
	log := filepath.Join(dir, "log")
	o.must("restore", "two", "--log", "file://"+log)
	s.checkConsecutive(1, append(before, o.waitFile(log, 5)...))
}

// verifyFindsDamage: whatever file of a checkpoint changes, is missing or is
// additional, verify names it, and whoever restores or exports it is refused.
func verifyFindsDamage(s *scenario) {
	o := s.operator()
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 2)
	o.must("create", c.ID(), "one")
	s.waitExit(first, 137)
	o.must("verify", "one")
	dir := filepath.Join(s.testbed.Dir, "state/checkpoints/one")
	var files []string
	s.check(filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	}))
	tried := 0
	for _, path := range files {
		name := filepath.Base(path)
		if name == "kata-checkpoint-record.json" || !regexp.MustCompile(`^(pages-1|inventory|core-1)\.img$|^rootfs-diff.tar$|^kata-checkpoint.json(.sig)?$|^spec.dump$`).MatchString(name) {
			continue
		}
		tried++
		data, err := os.ReadFile(path)
		s.check(err)
		changed := slices.Clone(data)
		changed[len(changed)/2] ^= 0x40
		s.check(os.WriteFile(path, changed, 0o600))
		out, _, status := o.try("verify", "one")
		if status != 2 || !strings.Contains(out, "error") {
			s.Errorf("%s was changed, and verify says (status %d) %q", name, status, out)
		}
		if strings.HasSuffix(name, ".img") && !strings.Contains(out, name) {
			s.Errorf("%s was changed, and verify does not name it: %q", name, out)
		}
		if strings.HasSuffix(name, ".img") {
			o.checkFails("damaged", "export", "one", filepath.Join(s.newDir(), "x"))
			o.checkFails("damaged", "restore", "one")
		}
		s.check(os.Remove(path))
		if out, _, status := o.try("verify", "one"); status == 0 {
			s.Errorf("%s is missing, and verify says %q", name, out)
		}
		s.check(os.WriteFile(path, data, 0o600))
	}
	if tried < 6 {
		s.Errorf("only %d files were tried of %v", tried, files)
	}
	more := filepath.Join(dir, "checkpoint/pages-99.img")
	s.check(os.WriteFile(more, nil, 0o600))
	o.checkFails("pages-99.img", "verify", "one")
	s.check(os.Remove(more))
	o.must("verify", "one")
	// Of another node: with another key.
	key := filepath.Join(s.testbed.Dir, "state/signing-key.pem")
	s.check(os.Rename(key, key+".old"))
	s.check(os.Rename(key+".pub", key+".pub.old"))
	s.afterContainers(func() error { return errors.Join(os.Rename(key+".old", key), os.Rename(key+".pub.old", key+".pub")) })
	if out, _, status := o.try("verify", "one"); status != 1 || !strings.Contains(out, "not trusted") {
		s.Errorf("with another key: status %d, %q", status, out)
	}
	o.must("trust", "add", key+".pub.old")
	o.must("verify", "one")
	var keys []struct {
		Fingerprint string
		Own         bool
	}
	o.mustJSON(&keys, "trust", "list")
	if len(keys) != 1 || keys[0].Own {
		s.Fatalf("trusted are %+v", keys)
	}
	o.must("trust", "remove", keys[0].Fingerprint[:20])
	if _, _, status := o.try("verify", "one"); status != 1 {
		s.Errorf("after the key was removed: status %d", status)
	}
}

// progressShown: a checkpoint of 256 MiB tells how far it is, and ends with all
// of it. Interrupted in the middle, nothing is left of it, and the container
// runs.
func progressShown(s *scenario) {
	o := s.operator()
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "256", "--shm-mib", "0", "--every", "500ms"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 2)

	// In the middle.
	cmd := o.command(s.ctx, "create", c.ID(), "interrupted", "--leave-running")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	s.check(cmd.Start())
	images := filepath.Join(s.testbed.Dir, "state/checkpoints")
	if !s.eventually(answerTimeout, func() bool { return treeSize(images) > 32<<20 }) {
		s.Error("nothing is written")
	}
	s.check(cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err == nil || !strings.Contains(stderr.String(), "interrupted") {
		s.Errorf("the interrupted command ends with %v: %s%s", err, stdout.String(), stderr.String())
	}
	s.checkStatus(first, client.Running)
	s.waitNumbers(first.Output, workload.Rounds, len(s.printedNumbers(first.Output, workload.Rounds))+2)
	if left, err := os.ReadDir(images); err != nil || len(left) > 0 {
		s.Errorf("the interrupted command left %v (%v)", left, err)
	}
	s.step("interrupted")

	// Killed, it cannot clean up: the container is resumed all the same, and the
	// next command removes its files.
	cmd = o.command(s.ctx, "create", c.ID(), "killed", "--leave-running")
	s.check(cmd.Start())
	if !s.eventually(answerTimeout, func() bool { return treeSize(images) > 32<<20 }) {
		s.Error("nothing is written")
	}
	s.check(cmd.Process.Kill())
	_ = cmd.Wait() // it was killed
	if !s.eventually(answerTimeout, func() bool {
		status, err := first.Status(s.ctx)
		return err == nil && status.Status == client.Running
	}) {
		s.Error("the container stays paused")
	}
	s.waitNumbers(first.Output, workload.Rounds, len(s.printedNumbers(first.Output, workload.Rounds))+2)
	s.step("killed")

	_, text, status := o.try("create", c.ID(), "one", "--leave-running")
	if status != 0 {
		s.Fatalf("status %d: %s", status, text)
	}
	var percents []int
	for _, m := range regexp.MustCompile(`\((\d+) %\), [0-9.]+ [KMG]?i?B`).FindAllStringSubmatch(text, -1) {
		n, err := strconv.Atoi(m[1])
		s.check(err)
		percents = append(percents, n)
	}
	s.Logf("progress: %s", text)
	if len(percents) < 3 || percents[len(percents)-1] != 100 || !slices.IsSorted(percents) || !strings.Contains(text, "MiB/s") || !strings.Contains(text, "dump") {
		s.Errorf("the progress has the percents %v: %s", percents, text)
	}
	o.must("verify", "one")
	if left, err := os.ReadDir(images); err != nil || len(left) != 1 {
		s.Errorf("beside the checkpoint there is %v (%v)", left, err)
	}
}

// treeSize is the size of the files below a directory, in bytes.
func treeSize(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // it grows
		}
		if info, err := d.Info(); err == nil {
			n += info.Size()
		}
		return nil
	})
	return n
}
