// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
)

// appBubblewrap: a program in a sandbox of bubblewrap's comes back where the
// sandbox consists of mounts. One with a user namespace, which bubblewrap makes
// for whoever is not root or lacks rights, is refused before anything is frozen.
func appBubblewrap(s *scenario) {
	c := s.createApp(parts.Bubblewrap, oci.WithPrivileged)
	run := s.run(c)
	s.waitNumbers(run.Output, appRounds, 2)
	user := func(*specs.Process) {}
	s.sandbox(run, "user", "", user)
	s.checkRefused("a sandbox with a user namespace", run, s.newDir(), "(pid ", "user namespace of its own", "terminate it")
	s.shell(run, "killall -9 bwrap count")
	if !s.eventually(caseTimeout, func() bool { return !s.succeeds(run, "pidof bwrap count") }) {
		s.Fatal("the sandbox does not end")
	}

	root := func(p *specs.Process) { p.User = specs.User{} }
	s.sandbox(run, "root", "", root)
	before := 0
	for range 2 {
		before = s.sandboxCount(run, "root", before)
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		run = s.restore(c, dir)
		s.waitNumbers(run.Output, appRounds, 2)
		before = s.sandboxCount(run, "root", before)
	}
}

// sandbox has an exec leave a program in a sandbox, which counts in a file of /tmp.
func (s *scenario) sandbox(run *engine.Run, name, options string, as func(*specs.Process)) {
	s.Helper()
	script := fmt.Sprintf("touch /tmp/here; bwrap --ro-bind / / --dev /dev --proc /proc --tmpfs /mnt --bind /tmp /tmp --ro-bind /tmp/here /mnt/here %s /app/count /tmp/%s >/tmp/%[2]s.log 2>&1 </dev/null &", options, name)
	s.waitExecExit(s.startExec(run, engine.Command{Args: []string{"sh", "-c", script}, Change: as}), 0)
	s.sandboxCount(run, name, 0)
}

// sandboxCount waits until a program in a sandbox has counted on, and returns how
// far it has come.
func (s *scenario) sandboxCount(run *engine.Run, name string, from int) (n int) {
	s.Helper()
	text := ""
	if !s.eventually(caseTimeout, func() bool {
		text = strings.Join(s.shell(run, "cat /tmp/"+name+" 2>/dev/null || true"), "\n")
		number, state, _ := strings.Cut(text, " ")
		var err error
		n, err = strconv.Atoi(number)
		return err == nil && state == "whole" && n > from+1
	}) {
		s.Fatalf("in the sandbox there is %q after %d, and it has printed %q", text, from, s.shell(run, "cat /tmp/"+name+".log"))
	}
	return n
}
