// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// casesDir is where containers have the programs of integration/cases.
const casesDir = "/cases/"

// caseTimeout is for three rounds of all programs.
const caseTimeout = 30 * time.Second

// caseProgram is a command line of a program of integration/cases, which prints
// a numbered round each second, and FAIL when something is not as it was.
type caseProgram struct {
	args string
	// skips: it may count several rounds at once.
	skips bool
}

// restoredCases come back from every checkpoint. They share one container.
var restoredCases = []caseProgram{
	{args: "sysv attached"},
	{args: "sysv detached"},
	{args: "sysv sem"},
	{args: "sysv msg"},
	{args: "named-sem keep"},
	{args: "named-sem unlink"},
	{args: "timerfd-periodic", skips: true},
	{args: "backlog"},
	{args: "loopback"},
	{args: "socket-options"},
	{args: "files ghost /home"},
	{args: "files hardlink /home"},
	{args: "files hardlink /run"},
	{args: "files elsewhere /run"},
	{args: "files renamed /home"},
	{args: "files log /var/log"},
	{args: "files log /data"}, // whose file the host renames
	{args: "files locked /home"},
	{args: "files bytes /home"},
	{args: "files bytes /run"},
	{args: "files mapped /home"},
	{args: "mapped-file /home"},
	{args: "lock-count posix /home"},
	{args: "lock-count ofd /home"},
	{args: "lock-count flock /home"},
	{args: "directories cwd /home"},
	{args: "directories open /home"},
	{args: "proc-files self"},
	{args: "proc-files child"},
	{args: "proc-files parent"},
	{args: "proc-files ended"},
	{args: "proc-files maps"},
	{args: "files leased /home"},
	{args: "unix-names direct /home"},
	{args: "unix-names direct /run"},
	{args: "unix-names renamed /home"},
	{args: "unix-names renamed /run"},
	{args: "unix-names linked /home"},
	{args: "unix-names linked /run"},
	{args: "watch /home /etc/passwd /run /data"},
	{args: "watch /app/config.yaml"}, // a mount of its own
	{args: "odd-socket packet"},
	{args: "odd-socket raw"},
	{args: "odd-socket route"},
	{args: "own-address tcp 127.0.0.1"},
	{args: "own-address udp 127.0.0.1"},
	{args: "thread-attributes"},
	{args: "locked-map /home"},
	{args: "locked-map /run"},
	{args: "own-address nowhere 2001:db8::ff00:42:8329"},
}

// casesMount has the programs.
func (s *scenario) casesMount() specs.Mount {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	dir, err := p.Cases(s.ctx)
	s.check(err)
	return bind(dir, strings.TrimSuffix(casesDir, "/"), "ro")
}

// casesRestored: what programs hold that are known to be hard to checkpoint comes
// back, twice.
func casesRestored(s *scenario) {
	var script strings.Builder
	for _, c := range restoredCases {
		fmt.Fprintf(&script, "CASE='%s' %s%s &\n", c.args, casesDir, c.args)
	}
	script.WriteString("wait\n")
	volume, config := s.newDir(), filepath.Join(s.newDir(), "config.yaml")
	s.check(os.WriteFile(config, nil, 0o644))
	c := s.create(engine.Container{ID: "c", Args: []string{"sh", "-c", script.String()}, Mounts: []specs.Mount{s.casesMount(), bind(volume, "/data", "rw"), bind(config, "/app/config.yaml", "rw")}})
	run := s.run(c)
	runs := []*engine.Run{run}
	s.waitCases(run)
	for cycle := range 2 {
		// As logrotate does on the host.
		name, rotated := fmt.Sprintf("log.%d", cycle+1), fmt.Sprintf("log.%d", cycle+2)
		s.check(os.Rename(filepath.Join(volume, name), filepath.Join(volume, rotated)))
		s.shell(run, "while [ -e /data/"+name+" ]; do sleep 0.1; done")
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		run = s.restore(c, dir)
		runs = append(runs, run)
		s.waitCases(run)
	}
	for _, program := range restoredCases {
		s.Run(program.args, func(t *testing.T) { program.checkRuns(t, runs) })
	}
}

// waitCases waits until each program has printed three rounds, or has failed.
func (s *scenario) waitCases(run *engine.Run) {
	s.Helper()
	s.waitRounds(run, restoredCases)
}

func (s *scenario) waitRounds(run *engine.Run, programs []caseProgram) {
	s.Helper()
	if s.eventually(caseTimeout, func() bool {
		return !slices.ContainsFunc(programs, func(c caseProgram) bool {
			rounds, failures := c.parse(run.Output.Lines())
			return len(rounds) < 3 && len(failures) == 0
		})
	}) {
		s.step("all programs have counted on")
	}
}

// parse returns the rounds that a program has printed, and whatever else.
func (c caseProgram) parse(lines []string) (rounds []int, failures []string) {
	for _, line := range lines {
		text, mine := strings.CutPrefix(line, c.args+": ")
		if !mine {
			continue
		}
		rest, isRound := strings.CutPrefix(text, "round ")
		number, _, _ := strings.Cut(strings.TrimSuffix(rest, ","), " ")
		n, err := strconv.Atoi(strings.TrimSuffix(number, ","))
		if !isRound || err != nil {
			failures = append(failures, text)
			continue
		}
		rounds = append(rounds, n)
	}
	return rounds, failures
}

// checkRuns checks that a program has counted on from run to run.
func (c caseProgram) checkRuns(t *testing.T, runs []*engine.Run) {
	last := 0
	for i, run := range runs {
		rounds, failures := c.parse(run.Output.Lines())
		if len(failures) > 0 {
			t.Errorf("in run %d: %q", i, failures)
		}
		if len(rounds) < 3 {
			t.Errorf("in run %d it has printed the rounds %v only", i, rounds)
		}
		for _, n := range rounds {
			if n != last+1 && (!c.skips || n <= last) {
				t.Errorf("in run %d round %d comes after round %d", i, n, last)
			}
			last = n
		}
	}
}

// refusedCase is something that no checkpoint brings back.
type refusedCase struct {
	name string
	// program is started in the container, and is there once ready succeeds.
	program, ready string
	// then happens on the host, with a file that becomes new in the container,
	// and undo in the container in the end.
	then    func()
	changed string
	undo    string
	// words are in the refusal.
	words []string
}

func (s *scenario) refusedCases(settings, data string) []refusedCase {
	out := []refusedCase{
		{name: "mqueue", undo: "rm /dev/mqueue/case", words: []string{"mqueue (pid ", "POSIX message queue /case", "communicate in another way"}},
		{name: "mqueue removed", words: []string{"mqueue (pid ", "POSIX message queue /case", "communicate in another way"}},
		{name: "mqueue left", undo: "rm /dev/mqueue/case", words: []string{"the container has the POSIX message queue /case", "remove it"}},
		{name: "time-namespace own", undo: "killall -9 time-namespace", words: []string{"time-namespace (pid ", "time namespace of its own", "terminate it"}},
		{name: "time-namespace children", undo: "killall -9 time-namespace", words: []string{"time-namespace (pid ", "has made a time namespace", "terminate it"}},
		{name: "uring-mapped", words: []string{"uring-mapped (pid ", "io_uring", "without io_uring"}},
		{name: "apart descriptors", words: []string{"apart (pid ", "a thread with file descriptors of its own", "terminate it"}},
		{name: "apart directory", words: []string{"apart (pid ", "a thread with a working directory of its own", "terminate it"}},
		{name: "apart deadline", words: []string{"apart (pid ", "SCHED_DEADLINE", "use another policy"}},
		{name: "apart pressure", words: []string{"apart (pid ", "waits for pressure by /proc/pressure/memory", "close it"}},
		{name: "odd-socket vsock", words: []string{"odd-socket (pid ", "vsock", "close it"}},
		{name: "odd-socket alg", words: []string{"odd-socket (pid ", "AF_ALG", "close it"}},
		{name: "proc-files thread", words: []string{"proc-files (pid ", "/task/", "of a thread", "close it"}},
		{name: "waiting accept", words: []string{"waiting (pid ", "has sent data to a unix socket that has not accepted its connection yet", "repeat the checkpoint"}},
		{name: "waiting closed", words: []string{"waiting (pid ", "has not accepted a connection of a unix socket yet", "repeat the checkpoint"}},
		{name: "waiting corked", words: []string{"waiting (pid ", "UDP_CORK", "repeat the checkpoint"}},
		{name: "waiting trap", words: []string{"waiting (pid ", "SIGTRAP pending", "handle the signal"}},
		{name: "odd-socket route-many", words: []string{"odd-socket (pid ", "multicast groups"}},
	}
	for i := range out {
		out[i].program, out[i].ready = casesDir+out[i].name, "grep -q round /tmp/case"
	}
	for kind, option := range map[string]string{"network": "-n", "user": "-U", "UTS": "-u", "IPC": "-i", "PID": "-p -f"} {
		out = append(out, refusedCase{
			name: "unshare " + option, program: "unshare " + option + " sleep 1000", ready: "pidof sleep", words: []string{"sleep (pid ", kind + " namespace of its own", "terminate it"},
		})
	}
	conf, log := filepath.Join(settings, "app.conf"), filepath.Join(data, "app.log")
	s.check(os.WriteFile(conf, []byte("old\n"), 0o644))
	return append(out, refusedCase{
		name: "own-address on the loopback interface", program: "ip addr add 10.77.0.1/32 dev lo && CASE=own exec " + casesDir + "own-address tcp 10.77.0.1", ready: "grep -q round /tmp/case",
		undo: "ip addr del 10.77.0.1/32 dev lo", words: []string{"own-address (pid ", "bound to 10.77.0.1:", "kata-checkpoint.dev/address: stays"},
	}, refusedCase{
		name: "log renamed and made again by the host", program: "exec sleep 1000 3>>/data/app.log", ready: "pidof sleep",
		then: func() {
			s.check(os.Rename(log, log+".1"))
			s.check(os.WriteFile(log, []byte("new\n"), 0o644))
		},
		changed: "/data/app.log",
		words:   []string{"sleep (pid ", "/data/app.log", "another file has taken its name", "reopen the file"},
	}, refusedCase{
		name: "no /proc", program: "mkdir -p /shared && mount -t tmpfs t /shared && mount --make-shared /shared && umount -l /proc && exec sleep 1000", ready: "[ ! -e /proc/1 ]",
		undo: "mount -t proc proc /proc; umount /shared", words: []string{"unmounted, moved or covered its /proc", "mount a proc file system there"},
	}, refusedCase{
		name: "volume covered", program: "mount -t tmpfs t /data", ready: "grep -q 'tmpfs /data ' /proc/mounts || grep -q ' /data tmpfs ' /proc/mounts", undo: "umount /data",
		words: []string{"mounted something over its mount /data", "unmount it"},
	}, refusedCase{
		name: "volume moved", program: "mkdir -p /moved && mount --move /data /moved", ready: "grep -q ' /moved ' /proc/mounts", undo: "mount --move /moved /data",
		words: []string{"moved a volume to /moved", "move it back"},
	}, refusedCase{
		name: "file on a detached mount", program: "mkdir -p /gone && mount -t tmpfs t /gone && exec 3>/gone/file && umount -l /gone && exec sleep 1000", ready: "pidof sleep && ! grep -q ' /gone ' /proc/mounts",
		words: []string{"sleep (pid ", "file /file open, whose mount was unmounted", "close it"},
	}, refusedCase{
		name: "file on a covered mount", program: "mkdir -p /twice && mount -t tmpfs t /twice && exec 3>/twice/file && mount -t tmpfs u /twice && exec sleep 1000", ready: "pidof sleep", undo: "umount /twice; umount /twice",
		words: []string{"sleep (pid ", "file /twice/file open on a mount that another one covers", "unmount what covers it"},
	}, refusedCase{
		name: "overlay", program: "mount -t overlay -o lowerdir=/t/l,upperdir=/t/u,workdir=/t/w o /m", ready: "grep -q ' /m ' /proc/mounts", undo: "umount /m",
		words: []string{"overlay", " /m,", "unmount it"},
	}, refusedCase{
		name: "file replaced on a read-only volume", program: "sleep 1000 </conf/app.conf", ready: "pidof sleep",
		then: func() {
			s.check(os.WriteFile(conf+".new", []byte("new\n"), 0o644))
			s.check(os.Rename(conf+".new", conf))
		},
		changed: "/conf/app.conf",
		words:   []string{"sleep (pid ", "/conf/app.conf", "replaced on the read-only mount /conf", "reopen the file"},
	}, refusedCase{
		name: "private root", program: "mount --make-private /", ready: "! grep -q ' / [^ ]* master:' /proc/self/mountinfo",
		undo: "mount --make-private /b", words: []string{"a mount at /b that is a slave of one outside of the container", "make it private"},
	})
}

// casesRefused: what cannot come back is refused in one sentence, before anything
// is frozen, and the container keeps running. What its programs have mounted comes back
// where CRIU can make it again.
func casesRefused(s *scenario) {
	settings, data := s.newDir(), s.newDir()
	counting := counter("c")
	counting.Mounts = []specs.Mount{s.casesMount(), bind(settings, "/conf", "ro"), bind(data, "/data", "rw")}
	counting.Spec = []oci.SpecOpts{oci.WithPrivileged}
	c := s.create(counting)
	run := s.run(c)
	s.shell(run, "mkdir /a /b /m /t && echo bound >/a/file && mount --bind /a /b && mount -t tmpfs t /t && mkdir /t/l /t/u /t/w && echo lower >/t/l/file")
	for _, refused := range s.refusedCases(settings, data) {
		s.Run(refused.name, func(t *testing.T) {
			s.sub(t).checkCase(run, refused)
		})
	}
	// What makes sandboxes, such as bubblewrap: a mount namespace with a root of its
	// own, into which it binds what the program needs.
	sandbox := s.shell(run, `mkdir -p /mnt; unshare -m sh -c "mount -t tmpfs n /mnt && cd /mnt && mkdir bin old proc && mount --bind /bin bin && mount -t proc p proc &&
		echo nested >file && pivot_root . old && cd / && umount -l /old && exec sleep 4321" >/tmp/sandbox 2>&1 & echo $!`)[0]
	if !s.eventually(caseTimeout, func() bool { return s.succeeds(run, "[ -e /proc/"+sandbox+"/root/file ]") }) {
		s.Fatalf("there is no sandbox: %q", s.shell(run, "cat /tmp/sandbox"))
	}
	for range 2 { // nothing of them is left
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		run = s.restore(c, dir)
		if have := s.shell(run, "cat /b/file /t/l/file /proc/"+sandbox+"/root/file; grep -c -e ' /b ' -e ' /t ' /proc/mounts; grep -c -e ' / ' -e ' /bin ' -e ' /proc ' /proc/"+sandbox+"/mounts"); !slices.Equal(have, []string{"bound", "lower", "nested", "2", "3"}) {
			s.Errorf("in what the container has mounted there is %q", have)
		}
	}
}

func (s *scenario) checkCase(run *engine.Run, c refusedCase) {
	// In the background, so that it becomes a child of the container's init: an
	// exec is not part of a checkpoint.
	pid := s.shell(run, c.program+" >/tmp/case 2>&1 & echo $!")[0]
	if !s.eventually(caseTimeout, func() bool { return s.succeeds(run, c.ready+" || grep -q SETUP /tmp/case") }) || !s.succeeds(run, c.ready) {
		s.Fatalf("it has not begun: %q", s.shell(run, "cat /tmp/case"))
	}
	if c.then != nil {
		c.then()
		s.shell(run, "until grep -q new "+c.changed+"; do sleep 0.1; done")
	}
	s.checkRefused(c.name, run, s.newDir(), c.words...)
	if states := s.events.States(run.ID()); len(states) > 0 {
		s.Errorf("the container was %v", states)
	}
	s.checkKeepsCounting(run)
	s.shell(run, "killall -9 sleep; kill -9 "+pid+"; rm -f /tmp/case; true; "+c.undo)
}

// casesInAPod: what depends on how a container was created comes back, in the VM
// of a pod.
func casesInAPod(s *scenario) {
	pod := s.startPod()
	s.Run("ping", func(t *testing.T) {
		one := s.sub(t)
		// As containerd's CRI has it by default (enable_unprivileged_icmp).
		one.shellInGuest(pod, "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range")
		one.cycleCase(pod, "ping", caseProgram{args: "odd-socket ping"})
	})
	s.Run("backlog", func(t *testing.T) {
		one := s.sub(t)
		one.cycleCase(pod, "backlog", caseProgram{args: "backlog 8"})
	})
	s.Run("read-only root", func(t *testing.T) {
		one := s.sub(t)
		run := one.cycleCase(pod, "read-only", caseProgram{args: "proc-files self"}, oci.WithRootFSReadonly())
		if one.succeeds(run, "touch /x") || !one.succeeds(run, "touch /run/x") {
			one.Error("the root file system was read-only, and is writable after the restore, or /run is not")
		}
	})
	// The specs of nerdctl and of the CRI have no tmpfs at /run, unlike ctr's, and
	// CRIU makes its links there.
	s.Run("no tmpfs at /run", func(t *testing.T) {
		one := s.sub(t)
		one.cycleCase(pod, "watch", caseProgram{args: "watch /home /etc/passwd /run"}, oci.WithoutRunMount)
	})
	s.Run("SIGTERM blocked", func(t *testing.T) {
		one := s.sub(t)
		program := caseProgram{args: "stop-signal blocked"}
		run := one.cycleCase(pod, "blocked", program)
		one.check(run.Kill(s.ctx, syscall.SIGTERM))
		one.waitLine(run.Output, 0, program.args+": SIGTERM is pending")
		rounds, _ := program.parse(run.Output.Lines())
		if !one.eventually(caseTimeout, func() bool {
			now, _ := program.parse(run.Output.Lines())
			return len(now) > len(rounds)+2
		}) {
			one.Fatal("the container does not run after a SIGTERM that its init blocks")
		}
		one.check(run.Kill(s.ctx, syscall.SIGKILL))
		one.waitExit(run, 137)
	})
	s.Run("SIGTERM by default", func(t *testing.T) {
		one := s.sub(t)
		run := one.cycleCase(pod, "default", caseProgram{args: "stop-signal default"})
		one.check(run.Kill(s.ctx, syscall.SIGTERM))
		one.waitExit(run, 137) // by the SIGKILL into which Kata turns it
	})
	s.Run("mount point that the new container lacks", func(t *testing.T) {
		one := s.sub(t)
		made := engine.Container{ID: "made", Args: []string{"sh", "-c", "mkdir /made && mount -t tmpfs made /made && i=0; while :; do i=$((i+1)); echo $i >/made/round; echo round $i; sleep 0.1; done"}, Spec: []oci.SpecOpts{oci.WithPrivileged}}
		first := pod.create(made)
		run := one.run(first)
		one.waitNumbers(run.Output, workload.Rounds, 3)
		dir := one.checkpoint(run, true)
		one.waitExit(run, 137)
		made.ID = "lacking"
		lacking := pod.create(made)
		_, err := s.engine.Restore(s.ctx, lacking, dir)
		if err == nil {
			one.Fatal("a container is restored that lacks a mount point")
		}
		one.step("refused: %v", err)
		for _, part := range []string{"mounted something at /made,", "root file system of the checkpoint", errcode.NoMountPoint.String()} {
			if !strings.Contains(err.Error(), part) {
				one.Errorf("the refusal lacks %q: %v", part, err)
			}
		}
		one.remove(lacking)
		again := one.restore(first, dir) // which has the directory
		rounds := one.waitNumbers(again.Output, workload.Rounds, 3)
		one.checkConsecutive(1, append(one.printedNumbers(run.Output, workload.Rounds), rounds...))
	})
	s.Run("log that has grown", func(t *testing.T) {
		one := s.sub(t)
		c := engine.Container{ID: "log", Args: []string{"sh", "-c", "exec 3>>/data/app.log; i=0; while :; do i=$((i+1)); echo $i >&3; echo round $i; sleep 0.1; done"}, Mounts: []specs.Mount{bind(one.newDir(), "/data", "rw")}}
		first := pod.create(c)
		run := one.run(first)
		one.waitNumbers(run.Output, workload.Rounds, 3)
		dir := one.checkpoint(run, false)
		one.checkKeepsRunning(run) // and writes
		at := len(one.printedNumbers(run.Output, workload.Rounds))
		one.remove(first)
		c.ID = "log-restored"
		rounds := one.waitNumbers(one.restore(pod.create(c), dir).Output, workload.Rounds, 5)
		one.checkConsecutive(rounds[0], rounds)
		if rounds[0] > at {
			one.Errorf("it continues with %d, and had come to %d", rounds[0], at)
		}
	})
}

// cycleCase checkpoints a program twice and restores it in the same pod.
func (s *scenario) cycleCase(pod *pod, name string, program caseProgram, spec ...oci.SpecOpts) *engine.Run {
	s.Helper()
	container := engine.Container{ID: name, Args: []string{"sh", "-c", "CASE='" + program.args + "' exec " + casesDir + program.args}, Mounts: []specs.Mount{s.casesMount()}, Spec: spec}
	c := pod.create(container)
	runs := []*engine.Run{s.run(c)}
	for cycle := range 2 {
		run := runs[cycle]
		s.waitRounds(run, []caseProgram{program})
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		s.remove(c)
		container.ID = fmt.Sprintf("%s-%d", name, cycle)
		c = pod.create(container)
		runs = append(runs, s.restore(c, dir))
	}
	s.waitRounds(runs[2], []caseProgram{program})
	program.checkRuns(s.T, runs)
	return runs[2]
}

// sub is the scenario for a subtest.
func (s *scenario) sub(t *testing.T) *scenario {
	one := *s
	one.T = t
	return &one
}

// succeeds reports whether a script in a task ends with status 0.
func (s *scenario) succeeds(run *engine.Run, script string) bool {
	s.Helper()
	status, err := s.startExec(run, engine.Command{Args: []string{"sh", "-c", script}}).Exit(s.ctx)
	s.check(err)
	return status == 0
}
