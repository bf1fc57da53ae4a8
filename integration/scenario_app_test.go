// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
)

// An application is checkpointed and restored so many times, each time in
// another VM: the second checkpoint is of what a restore has made.
const appCycles = 2

// appPostgreSQL: a database under load loses no committed row. A transaction
// that is open at a checkpoint keeps its row lock, for which another one waits,
// and commits after the restore.
func appPostgreSQL(s *scenario) {
	c := s.createApp(parts.PostgreSQL)
	query := func(run *engine.Run, sql string) string {
		s.Helper()
		return strings.Join(s.shell(run, "psql -h /tmp -d postgres -qAtX -c \""+sql+"\""), "\n")
	}
	const waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
	locked := func(run *engine.Run) bool { return query(run, waiting) == "1" }
	const begun = 1000
	balance := begun
	s.cycle(c, appCheck{
		before: func(run *engine.Run, _ int) {
			if !s.eventually(scenarioTimeout, func() bool { return locked(run) }) {
				s.Fatalf("no transaction waits for another")
			}
		},
		after: func(run *engine.Run, cycle, rounds int) {
			if !locked(run) {
				s.Errorf("the row lock is lost: %s", query(run, "SELECT pid, mode, granted FROM pg_locks"))
			}
			const intact = "SELECT count(*) = max(n) AND max(n) >= %d AND bool_and(digest = md5(n::text)) FROM rows"
			if have := query(run, fmt.Sprintf(intact, rounds)); have != "t" {
				s.Errorf("after %d rows were inserted there is %s", rounds, query(run, "SELECT count(*), min(n), max(n) FROM rows"))
			}
			balance = 2 * (balance - 10)
			s.shell(run, "echo >/tmp/commit")
			s.waitLine(run.Output, 0, fmt.Sprintf("transfer %d leaves %d", cycle, balance))
		},
		last: func(run *engine.Run) {
			query(run, "SELECT bt_index_check('rows_pkey', true)")
			query(run, "CHECKPOINT")
		},
		stopped: func(lines []string) {
			for _, line := range lines {
				for _, bad := range []string{"PANIC", "terminated by signal", "not properly shut down", "interrupted"} {
					if strings.Contains(line, bad) {
						s.Errorf("the server has printed %q", line)
					}
				}
			}
			if last := lines[len(lines)-1]; strings.Join(strings.Fields(last), " ") != "Database cluster state: shut down" {
				s.Errorf("after its stop the server's control file says %q", last)
			}
		},
	})
}

// appJVM: a Java program with several threads and a garbage collected heap, the
// objects of which it verifies, runs its shutdown hook in the end.
func appJVM(s *scenario) {
	s.cycle(s.createApp(parts.JVM), appCheck{stopped: s.checkLast("stopped")})
}

// appRedis: a database in memory, which writes each change to a log on the disk
// and rewrites that by a child process, has all that it had. A client that waits
// for something keeps waiting for it.
func appRedis(s *scenario) {
	s.cycle(s.createApp(parts.Redis), appCheck{
		after: func(run *engine.Run, cycle, rounds int) {
			s.checkReached(rounds, s.shell(run, "redis-cli LLEN rounds"))
			popped := fmt.Sprintf("signal-%d", cycle)
			s.shell(run, "redis-cli LPUSH signals "+popped)
			s.waitLine(run.Output, 0, "popped "+popped)
		},
		stopped: s.checkLast("All AOF files and manifest are valid"),
	})
}

// appNginx: a web server with worker processes and memory that they share keeps
// its clients' connections, one of them in the middle of a download. With a
// configuration that is changed after the restore it starts other workers, and
// the one that serves the download stops once that is complete.
func appNginx(s *scenario) {
	get := func(run *engine.Run, path string) string {
		s.Helper()
		return strings.Join(s.shell(run, "wget -q -O - http://127.0.0.1:8080"+path), "\n")
	}
	workers := func(run *engine.Run) (out []string) {
		s.Helper()
		for _, line := range s.shell(run, "ps -o args") {
			if strings.HasPrefix(line, "nginx: worker process") {
				out = append(out, line)
			}
		}
		return out
	}
	s.cycle(s.createApp(parts.Nginx), appCheck{
		before: func(run *engine.Run, cycle int) {
			s.waitLine(run.Output, 0, fmt.Sprintf("downloads %d", cycle))
		},
		after: func(run *engine.Run, cycle, rounds int) {
			if slices.Contains(run.Output.Lines(), "reconnects") {
				s.Errorf("a client's connection was closed")
			}
			// Both workers count in the memory that they share.
			var accepted, handled, requests int
			status := get(run, "/status")
			_, counts, _ := strings.Cut(status, "requests\n")
			if _, err := fmt.Sscan(counts, &accepted, &handled, &requests); err != nil || requests <= 2*rounds {
				s.Errorf("after %d rounds of two requests the status is %q", rounds, status)
			}
			s.shell(run, fmt.Sprintf(`echo 'return 200 "version %d\n";' >/var/lib/nginx/version.conf; nginx -e stderr -c /app/nginx.conf -s reload`, cycle))
			want := fmt.Sprintf("version %d", cycle)
			if !s.eventually(scenarioTimeout, func() bool { return get(run, "/version") == want }) {
				s.Errorf("after the reload it is %q, not %q", get(run, "/version"), want)
			}
			if have := workers(run); len(have) != 3 {
				s.Errorf("while a download is in progress the workers are %q", have)
			}
			s.shell(run, "echo >/tmp/continue")
			s.waitLine(run.Output, 0, fmt.Sprintf("downloaded %d", cycle))
			if !s.eventually(scenarioTimeout, func() bool { return len(workers(run)) == 2 }) {
				s.Errorf("after the download the workers are %q", workers(run))
			}
		},
	})
}

// appNode: a server in JavaScript with a thread of its own, and a client with
// requests in flight. Its container has the seccomp profile that engines give by
// default, and Kata applies it in the guest: it keeps Node.js from using
// io_uring, which would refuse a checkpoint, and comes back with the processes.
func appNode(s *scenario) {
	c := s.createApp(parts.Node, seccomp.WithDefaultProfile(),
		oci.WithAnnotations(map[string]string{"io.katacontainers.config.runtime.disable_guest_seccomp": "false"}))
	s.cycle(c, appCheck{
		after: func(run *engine.Run, cycle, _ int) {
			// Of the server and of an exec. 2 is the mode with filters.
			if have := s.shell(run, "sed -n 's/^Seccomp:[^0-9]*//p' /proc/1/status /proc/self/status"); !slices.Equal(have, []string{"2", "2"}) {
				s.Errorf("the modes of seccomp are %q", have)
			}
			text := fmt.Sprintf("after-restore-%d", cycle)
			if have := s.shell(run, "wget -q -O - --post-data "+text+" http://127.0.0.1:8080/signal"); !slices.Equal(have, []string{"sent to 1"}) {
				s.Errorf("the signal was %q", have)
			}
			s.waitLine(run.Output, 0, "signal "+text)
		},
		stopped: s.checkLast("stopped"),
	})
}

// appPython: processes of Python's multiprocessing share memory, queues and
// databases of SQLite. One of them has the lock of a database, and keeps it until
// it is told to commit.
func appPython(s *scenario) {
	const (
		path  = "/var/lib/app/account.db"
		begun = 1000
	)
	s.cycle(s.createApp(parts.Python), appCheck{
		before: func(run *engine.Run, _ int) {
			s.waitLine(run.Output, 0, "transfer holds")
		},
		after: func(run *engine.Run, cycle, _ int) {
			have := s.shell(run, `python3 -c '
import sqlite3
db = sqlite3.connect("`+path+`", timeout=0, isolation_level=None)
print(*db.execute("SELECT balance FROM account").fetchone())
try:
    db.execute("BEGIN IMMEDIATE")
    print("free")
except sqlite3.OperationalError as e:
    print(e)'`)
			if want := []string{strconv.Itoa(begun - 10*(cycle-1)), "database is locked"}; !slices.Equal(have, want) {
				s.Errorf("the database with an open transaction: %q, not %q", have, want)
			}
			s.shell(run, "echo >/tmp/commit")
			s.waitLine(run.Output, 0, fmt.Sprintf("transfer leaves %d", begun-10*cycle))
		},
		stopped: s.checkLast("database ok"),
	})
}

// appDBus: a message bus keeps its clients and what it watches by inotify, on
// virtiofs: of a service that is installed after the restore it learns at once.
func appDBus(s *scenario) {
	// Other engines' containers have no file system of their own at /run, as
	// containerd's default has.
	s.cycle(s.createApp(parts.DBus, oci.WithoutRunMount), appCheck{
		after: func(run *engine.Run, cycle, _ int) {
			text := fmt.Sprintf("after-restore-%d", cycle)
			s.shell(run, "/app/signal "+text)
			s.waitLine(run.Output, 0, fmt.Sprintf("signal %q", text))
			name := fmt.Sprintf("app.Installed%d", cycle)
			activatable := func() bool {
				return slices.Contains(strings.Fields(strings.Join(s.shell(run, "/app/call ListActivatableNames"), " ")), name)
			}
			if activatable() {
				s.Errorf("%s is there already", name)
			}
			s.shell(run, fmt.Sprintf(`printf '[D-BUS Service]\nName=%s\nExec=/bin/true\n' >/var/lib/app/services/%[1]s.service`, name))
			if !s.eventually(scenarioTimeout, activatable) {
				s.Errorf("it does not see %s, which was installed: %q", name, s.shell(run, "/app/call ListActivatableNames"))
			}
		},
		stopped: s.checkLast("stopped"),
	})
}

// appGo: a server of Go's own library and its client, with several requests in
// flight on one connection, encrypted and with HTTP/2.
func appGo(s *scenario) {
	s.cycle(s.createApp(parts.Go), appCheck{
		after: func(run *engine.Run, cycle, _ int) {
			text := fmt.Sprintf("after-restore-%d", cycle)
			s.shell(run, "/app/run signal "+text)
			s.waitLine(run.Output, 0, "signal "+text)
		},
		stopped: s.checkLast("stopped"),
	})
}

// checkLast returns a check of the last line that an application prints.
func (s *scenario) checkLast(want string) func(lines []string) {
	return func(lines []string) {
		s.Helper()
		if last := lines[len(lines)-1]; last != want {
			s.Errorf("the last line is %q, not %q", last, want)
		}
	}
}

// checkReached checks the number that an application has reached, which is in
// the only line of an answer: it is above that of the checkpoint.
func (s *scenario) checkReached(rounds int, answer []string) {
	s.Helper()
	if n, err := strconv.Atoi(strings.Join(answer, "\n")); err != nil || n <= rounds {
		s.Errorf("after %d rounds the answer is %q", rounds, answer)
	}
}

// appCheck is what is particular to an application; each may be missing.
type appCheck struct {
	// before waits for what is to be there at a checkpoint, the first or the
	// second.
	before func(run *engine.Run, cycle int)
	// after checks the application once it is restored. It had printed the
	// number of so many rounds by then.
	after func(run *engine.Run, cycle, rounds int)
	// last is called before the application is stopped.
	last func(run *engine.Run)
	// stopped checks what the last run has printed.
	stopped func(lines []string)
}

// createApp makes a container of an application's image, which goes away with
// the scenario, and whose processes run as an unprivileged user. Its OCI spec may
// be changed further.
func (s *scenario) createApp(a parts.App, spec ...oci.SpecOpts) client.Container {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	image, err := p.AppImage(s.ctx, a)
	s.check(err)
	s.check(s.testbed.Import(s.ctx, image))
	s.afterContainers(func() error {
		// The test's context has ended by then.
		return s.engine.Client.ImageService().Delete(context.WithoutCancel(s.ctx), a.ImageName(), images.SynchronousDelete())
	})
	s.step("imported %s", a.ImageName())
	container, err := s.engine.Create(s.ctx, engine.Container{
		ID: s.id("c"), Image: a.ImageName(), Spec: append(spec, oci.WithUIDGID(1000, 1000)),
	})
	s.check(err)
	return container
}

// cycle runs an application through its checkpoints and restores, and stops it
// as an engine does: SIGTERM, after which it exits with 0. All the time it
// prints the numbers of its rounds, each once the round is done, none twice.
func (s *scenario) cycle(c client.Container, check appCheck) {
	s.Helper()
	run := s.run(c)
	defer func() {
		if s.Failed() {
			lines := run.Output.Lines()
			s.Logf("the application has printed %q", lines[max(0, len(lines)-20):])
		}
	}()
	var rounds []int
	const more = 5
	s.waitNumbers(run.Output, appRounds, more)
	s.step("it works")
	boot := s.appBoot(run)
	for cycle := 1; cycle <= appCycles; cycle++ {
		if check.before != nil {
			check.before(run, cycle)
		}
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		rounds = append(rounds, s.printedNumbers(run.Output, appRounds)...)
		s.checkConsecutive(1, rounds)

		run = s.restore(c, dir)
		s.checkConsecutive(len(rounds)+1, s.waitNumbers(run.Output, appRounds, more))
		s.step("it continues after %d rounds", len(rounds))
		now := s.appBoot(run)
		if now == boot {
			s.Errorf("restored in the same boot %s", boot)
		}
		boot = now
		if check.after != nil {
			check.after(run, cycle, len(rounds))
		}
		s.step("checked")
	}
	if check.last != nil {
		check.last(run)
	}
	s.check(run.Kill(s.ctx, syscall.SIGTERM))
	s.waitExit(run, 0)
	s.step("stopped")
	s.checkConsecutive(len(rounds)+1, s.printedNumbers(run.Output, appRounds))
	if check.stopped != nil {
		check.stopped(run.Output.Lines())
	}
	s.checkExitEvents(c, 137, 137, 0)
}

// appBoot returns the boot ID of the kernel in which an application runs.
func (s *scenario) appBoot(run *engine.Run) string {
	s.Helper()
	return strings.Join(s.shell(run, "cat /proc/sys/kernel/random/boot_id"), "\n")
}

// appRounds returns the numbers of an application's rounds, among the other
// lines that it prints. What its program has found is an error.
func appRounds(lines []string) (rounds []int, err error) {
	for _, line := range lines {
		if strings.HasPrefix(line, "failed: ") {
			return nil, fmt.Errorf("the application's client says %q", line)
		}
		number, ok := strings.CutPrefix(line, "round ")
		if !ok {
			continue
		}
		n, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("parse %q: %w", line, err)
		}
		rounds = append(rounds, n)
	}
	return rounds, nil
}
