// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// dockerStart is for dockerd to serve.
const dockerStart = 30 * time.Second

// dockerLife: a container's life by docker's own binaries, from run to rm. It
// is checkpointed and shown as exited, started from the checkpoint, and all of
// that again; its log continues without a gap, and it is as healthy as before.
// One whose annotation says so keeps running when docker leaves it running.
func dockerLife(s *scenario) {
	d := s.docker()
	volume := s.newDir()
	s.check(os.WriteFile(filepath.Join(volume, "healthy"), nil, 0o644))
	id := d.runCounter("counter", "--volume", volume+":/volume", "--health-cmd", "ls /volume/healthy", "--health-interval", "1s", "--health-timeout", "20s")
	d.waitCount("counter", 5)
	if out := d.mustRun("exec", "counter", "sh", "-c", "echo hello from $(hostname)"); out != "hello from "+id[:12] {
		s.Errorf("exec prints %q", out)
	}
	d.waitHealthy()
	for _, checkpoint := range []string{"one", "two"} { // the second of a restored one
		d.mustRun("exec", "counter", "sh", "-c", "echo before >/volume/"+checkpoint)
		d.mustRun("checkpoint", "create", "counter", checkpoint)
		d.checkCounter("exited 137")
		d.startFrom(checkpoint)
		d.checkCounter("running 0")
		at := d.waitCount("counter", 5)
		d.waitCount("counter", at+5)
		if out := d.mustRun("exec", "counter", "cat", "/proc/1/comm", "/volume/"+checkpoint); out != "workload\nbefore" {
			s.Errorf("the restored container prints %q", out)
		}
		d.waitHealthy()
		s.step("checkpointed, restored, and counts on")
	}
	// docker looks whether a name is taken before it asks for a checkpoint.
	if out, err := d.tryRun("checkpoint", "create", "counter", "two"); err == nil || !strings.Contains(out, "already exists") {
		s.Errorf("a second checkpoint of one name: %v\n%s", err, out)
	}
	d.checkCounter("running 0")
	if out := d.mustRun("checkpoint", "ls", "counter"); !strings.Contains(out, "one") || !strings.Contains(out, "two") {
		s.Errorf("docker checkpoint ls prints %q", out)
	}
	d.mustRun("stop", "--time", "5", "counter")
	d.checkCounter("exited 2") // how Go exits on SIGTERM as init, which no signal kills from within
	d.mustRun("rm", "counter")
	s.step("stopped and removed")

	d.runCounter("stays", "--annotation", "kata-checkpoint.dev/after=leave-running")
	at := d.waitCount("stays", 5)
	d.mustRun("checkpoint", "create", "--leave-running", "stays", "one")
	d.waitCount("stays", at+5)
	if out := d.mustRun("inspect", "--format", "{{.State.Status}}", "stays"); out != "running" {
		s.Errorf("after a checkpoint that leaves it running it is %s", out)
	}
	s.step("checkpointed, and left running")
	d.mustRun("rm", "--force", "stays")
	if out := d.mustRun("ps", "--all", "--quiet"); out != "" {
		s.Errorf("there is %q left", out)
	}
}

// docker is the client, with a daemon of the scenario's own on the testbed's
// containerd.
type docker struct{ command }

func (s *scenario) docker() *docker {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	if !p.HaveDocker() {
		s.Skip("there is no docker: `make docker` builds one, which takes five minutes")
	}
	program, daemon, err := p.Docker(s.ctx)
	s.check(err)
	dir := filepath.Join(s.testbed.Dir, "docker")
	host := "unix://" + filepath.Join(dir, "docker.sock")
	// Of the machine's network it touches nothing.
	log := s.startDaemon(dir, daemon, "--experimental", "--containerd", s.testbed.Address, "--host", host, "--data-root", filepath.Join(dir, "data"),
		"--exec-root", filepath.Join(dir, "run"), "--pidfile", filepath.Join(dir, "pid"),
		"--bridge", "none", "--iptables=false", "--ip6tables=false", "--userland-proxy=false")
	d := &docker{command{scenario: s, program: program, options: []string{"--host", host}}}
	if !s.eventually(dockerStart, func() bool {
		_, err := d.tryRun("version")
		return err == nil
	}) {
		said, _ := os.ReadFile(log)
		s.Fatalf("dockerd does not serve:\n%s", said)
	}
	s.afterContainers(func() error {
		ctx := context.WithoutCancel(s.ctx)
		left, err := d.run(ctx, "ps", "--all", "--quiet")
		if ids := strings.Fields(left); err == nil && len(ids) > 0 { // the scenario has failed
			_, err = d.run(ctx, append([]string{"rm", "--force"}, ids...)...)
		}
		return err
	})
	image, err := p.WorkloadImage(s.ctx, p.Bin("workload"), workload.Path)
	s.check(err)
	d.mustRun("load", "--input", image)
	s.step("dockerd serves")
	return d
}

// runCounter runs a counter and gives its id.
func (d *docker) runCounter(name string, options ...string) string {
	d.Helper()
	args := append([]string{"run", "--detach", "--name", name, "--runtime", testbed.Runtime, "--network", "none", "--pull", "never"}, options...)
	id := d.mustRun(append(args, parts.WorkloadImageName, workload.Path, "counter")...)
	d.adopt(id)
	d.step("docker run %s", name)
	return id
}

// startFrom starts the counter from a checkpoint. docker puts it into
// containerd's store for that, and fails where the blob from which it has made
// the checkpoint is still there: until containerd's next garbage collection.
func (d *docker) startFrom(checkpoint string) {
	d.Helper()
	out, err := d.tryRun("start", "--checkpoint", checkpoint, "counter")
	if err != nil && strings.Contains(out, "already exists") {
		d.ctr("content", "prune", "references")
		out, err = d.tryRun("start", "--checkpoint", checkpoint, "counter")
	}
	if err != nil {
		d.Fatalf("docker start --checkpoint %s: %v\n%s", checkpoint, err, out)
	}
}

// checkCounter checks what docker shows of the counter. That a container has
// ended docker hears a moment later than who has ended it.
func (d *docker) checkCounter(want string) {
	d.Helper()
	var have string
	if !d.eventually(settleTimeout, func() bool {
		have = d.mustRun("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "counter")
		return have == want
	}) {
		d.Errorf("docker shows the counter as %q, not %q", have, want)
	}
}

// waitHealthy waits until docker's check has found the counter so.
func (d *docker) waitHealthy() {
	d.Helper()
	var have string
	if !d.eventually(answerTimeout, func() bool {
		have = d.mustRun("inspect", "--format", "{{.State.Health.Status}}", "counter")
		return have == "healthy"
	}) {
		d.Errorf("docker shows the counter as %s", have)
	}
}
