// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// Class is what a finding means for a checkpoint.
type Class int

// Classes, the worst one last.
const (
	// Good is restored as it was. It is never a finding.
	Good Class = iota
	// Warning is something that is different after a restore.
	Warning
	// Unknown is something that no rule knows: CRIU may refuse it.
	Unknown
	// Refused is something that makes a checkpoint impossible.
	Refused
)

// Finding is what a look at a container found about one of its processes.
type Finding struct {
	Class Class
	// Code is for what is refused.
	Code errcode.Code
	// Process names the process and its PID, as its own container shows it. It is
	// empty where a finding is about the container as a whole.
	Process string
	// What completes "the process P ..." or "the container ...", and Advice is
	// what to do about it.
	What, Advice string
	// Stale: it may be wrong of processes that run, whose descriptors are read before
	// their sockets are: a connection that was accepted in between has no owner.
	Stale bool
}

// String is one line, whatever the names in it are.
func (f Finding) String() string {
	subject := "the container "
	if f.Process != "" {
		subject = "the process " + f.Process + " "
	}
	s := text.Line(subject+f.What, maxFinding)
	if f.Advice != "" {
		s += ": " + f.Advice
	}
	return s
}

// maxFinding bounds what a finding says, less its advice, in bytes.
const maxFinding = 1024

// maxQuoted bounds the findings in one message.
const maxQuoted = 10

// Refusal is an error with all findings that forbid a checkpoint, in one line,
// each with its code, or nil if there are none.
func Refusal(findings []Finding) error {
	var texts []string
	for _, f := range findings {
		if f.Class == Refused {
			texts = append(texts, errcode.With(f.String(), f.Code))
		}
	}
	if len(texts) == 0 {
		return nil
	}
	if more := len(texts) - maxQuoted; more > 0 {
		texts = append(texts[:maxQuoted], fmt.Sprintf("and %d more like these", more))
		return errclass.Precondition(errcode.Refused, "%s", strings.Join(texts, "; "))
	}
	return errclass.With(errdefs.ErrFailedPrecondition, errcode.Parse(strings.Join(texts, "; ")))
}

// Passing reports whether only such things forbid a checkpoint as another look in
// a moment may not find, if the programs run: what has arrived is read, who has
// connected is accepted, and what was stale is not.
func Passing(findings []Finding) bool {
	some := false
	for _, f := range findings {
		if f.Class == Refused && f.Code != errcode.SocketBusy && !f.Stale {
			return false
		}
		some = some || f.Class == Refused
	}
	return some
}

// Check compares what was read of a container with what CRIU can dump and
// restore: CRIU itself would fail later, and with a message deep in its log.
// Stdio is what the kata-agent gave to init. It returns each finding once for a
// process.
func (c *Container) Check(stdio []*api.Stdio, o *api.CheckpointOptions) ([]Finding, error) {
	var out []Finding
	members := make(map[int]bool, len(c.Processes))
	for _, p := range c.Processes {
		members[p.PID] = true
	}
	for _, p := range c.Processes {
		if p != c.Root && !members[p.Parent] && c.orphaned(p) {
			out = append(out, c.finding(p, orphan))
		}
		if p.Headless {
			out = append(out, c.finding(p, headless))
		}
		for _, f := range p.Files {
			if r := classify(p, f, stdio); r.class != Good {
				out = append(out, c.finding(p, r))
			}
			if r := c.procFile(f); r.class != Good {
				out = append(out, c.finding(p, r))
			}
			if r := c.pidFile(f, members); r.class != Good {
				out = append(out, c.finding(p, r))
			}
		}
		for _, m := range p.Mappings {
			// A ring may be mapped after its descriptor was closed or registered.
			if kind, ok := strings.CutPrefix(m.Path, anonInode); ok && anonymous[kind].class != Good {
				out = append(out, c.finding(p, anonymous[kind]))
			}
		}
	}
	for _, p := range c.all() {
		// CRIU stops the processes of execs as well, which have the same cgroup.
		if p.Tracer != 0 {
			out = append(out, c.finding(p, rule{Refused, errcode.Traced, "is traced by the process " + Name(p.Tracer) + ", and CRIU has to trace it itself", "detach the tracer"}))
		}
		if p.Trapped {
			out = append(out, c.finding(p, trapped))
		}
		if p.Exec {
			out = append(out, c.finding(p, execed))
		}
	}
	out = append(out, c.lost()...)
	out = append(out, c.nestedNamespaces()...)
	out = append(out, c.unusualSockets(o)...)
	external, err := c.externalSockets(o.GetExternalUnixSockets())
	if err != nil {
		return nil, err
	}
	out = append(out, external...)
	out = append(out, c.waiting()...)
	out = append(out, c.connected(o)...)
	return distinct(out), nil
}

func distinct(findings []Finding) []Finding {
	seen := make(map[Finding]bool)
	return slices.DeleteFunc(findings, func(f Finding) bool {
		again := seen[f]
		seen[f] = true
		return again
	})
}

// rule is a row of the table: what a thing means for a checkpoint.
type rule struct {
	class        Class
	code         errcode.Code
	what, advice string
}

// anonymous is the table of descriptors without a file system, by the name that
// the kernel gives them: those that CRIU 4.2 can dump (criu/files.c,
// dump_one_file), and those that it is known not to.
var anonymous = map[string]rule{
	"[eventfd]":          {},
	"[eventpoll]":        {},
	"[signalfd]":         {},
	"[timerfd]":          {},
	"[pidfd]":            {},
	"inotify":            {},
	"[fanotify]":         {},
	"bpf-map":            bpf("map"),
	"bpf-prog":           bpf("program"),
	"bpf_link":           bpf("link"),
	"[io_uring]":         {Refused, errcode.IOUring, "uses io_uring, which CRIU cannot checkpoint", "run the program without io_uring, or disable it in the guest (sysctl kernel.io_uring_disabled=2, see docs/limits.md)"},
	"[perf_event]":       unsupported("a performance counter (perf_event_open)"),
	"[userfaultfd]":      unsupported("a userfaultfd"),
	"seccomp notify":     unsupported("a listener of seccomp notifications"),
	"[landlock-ruleset]": unsupported("a ruleset of Landlock"),
	"[fscontext]":        unsupported("a file system that is being mounted (fsopen)"),
	"sync_file":          unsupported("a fence of a graphics driver (sync_file)"),
}

// unsupported is a descriptor of a kind that CRIU cannot dump.
func unsupported(what string) rule {
	return rule{Refused, errcode.DescriptorKind, "has " + what + " open, which CRIU cannot checkpoint", "close it before the checkpoint, or run the program without it"}
}

// bpf is an object of BPF. CRIU has support for maps only, and the guest bundle's
// CRIU is built without.
func bpf(kind string) rule {
	return rule{Refused, errcode.BPFObject, "has a BPF " + kind + " open, which CRIU cannot checkpoint", "close it before the checkpoint, or run the program without it"}
}

// anonInode starts the names of such descriptors and of their mappings.
const anonInode = "anon_inode:"

// controllingTTY is a process that has /dev/tty open: CRIU looks for the
// terminal only among those that the container has both ends of (criu/tty.c,
// tty_verify_ctty).
var controllingTTY = rule{Refused, errcode.ControllingTTY, "has /dev/tty open, as shells with job control do, which CRIU cannot checkpoint with the container's own terminal",
	"terminate it, or run the container without a terminal"}

// orphan is a process that has lost its parent in a PID namespace that is not
// its container's own. It is a child of that namespace's init then, and CRIU,
// which walks the tree from its root, does not see it.
var orphan = rule{Refused, errcode.Orphan, "has lost its parent and is no longer a descendant of the container's init, below which CRIU looks for processes",
	"have init adopt orphans, as an init program does that is told to be a subreaper, or run the container with a pid namespace of its own (shareProcessNamespace: false)"}

// execed is a process of an exec that has not ended.
var execed = rule{class: Warning, what: "was started by an exec, which the image set does not contain"}

// headless is a process whose main thread has called pthread_exit(3): CRIU
// copies what threads share from the main one (criu/cr-dump.c).
var headless = rule{Refused, errcode.MainThreadGone, "runs on after its main thread has exited, which CRIU cannot checkpoint", "have the main thread wait for the others"}

// trapped is a process with a pending SIGTRAP, which CRIU uses itself
// (compel/src/lib/infect.c, compel_wait_task).
var trapped = rule{Refused, errcode.PendingSignal, "has a SIGTRAP pending, which CRIU cannot checkpoint", "have it handle the signal before the checkpoint, or terminate it"}

// classify finds the rule for a descriptor.
func classify(p *Process, f File, stdio []*api.Stdio) rule {
	if f.Name == "/dev/tty" && isStdio(p.Terminal, stdio) {
		return controllingTTY
	}
	if strings.HasPrefix(f.Name, "pipe:") && f.Flags&unix.O_DIRECT != 0 {
		return unsupported("a pipe in packet mode (O_DIRECT)")
	}
	kind, ok := strings.CutPrefix(f.Name, anonInode)
	if !ok {
		return rule{} // paths, pipes and namespaces; sockets are looked at as a whole
	}
	if r, known := anonymous[kind]; known {
		return r
	}
	return rule{class: Unknown, what: fmt.Sprintf("has %s open, which this version does not know", f.Name)}
}

// procFile finds the rule for a file of /proc about a thread or a process. CRIU
// opens it by its name: that of a thread before it makes any (criu/files-reg.c,
// open_path), and one of a process that is not in the image set never.
func (c *Container) procFile(f File) rule {
	name, ok := strings.CutPrefix(f.Name, "/proc/")
	if !ok {
		return rule{}
	}
	parts := strings.Split(name, "/")
	pid, err := strconv.Atoi(parts[0])
	if err != nil {
		return rule{}
	}
	if len(parts) > 2 && parts[1] == "task" && parts[2] != parts[0] && strings.Trim(parts[2], "0123456789") == "" {
		return rule{Refused, errcode.ThreadFile, "has " + f.Name + " open, which is of a thread and cannot be restored", "close it before the checkpoint"}
	}
	depth := len(c.Root.PIDs)
	for _, p := range c.Execs {
		if len(p.PIDs) >= depth && p.PIDs[depth-1] == pid {
			return rule{Refused, errcode.ExecPeer, "has " + f.Name + " open, of " + c.ofExec(p), endExec}
		}
	}
	return rule{}
}

// pidFile finds the rule for a pidfd: CRIU restores one of a process of the image
// set, or of none (criu/pidfd.c, dump_one_pidfd).
func (c *Container) pidFile(f File, members map[int]bool) rule {
	const closeIt = "close it before the checkpoint"
	switch {
	case f.Name != pidFD:
		return rule{}
	case f.Flags&pidFDThread != 0:
		return rule{Refused, errcode.ForeignProcess, "has a pidfd of a thread (PIDFD_THREAD) open, which CRIU cannot checkpoint", closeIt}
	case f.Target == -1 || members[f.Target]:
		return rule{}
	}
	for _, p := range c.Execs {
		if p.PID == f.Target {
			return rule{Refused, errcode.ExecPeer, "has a pidfd open of " + c.ofExec(p), endExec}
		}
	}
	if descends(f.Target, members) {
		return rule{} // it was started since the processes were listed
	}
	return rule{Refused, errcode.ForeignProcess, "has a pidfd open of a process that is not in the container", closeIt}
}

// descends reports whether a process has an ancestor among others, or has exited.
func descends(pid int, others map[int]bool) bool {
	for pid > 1 {
		stat, err := procfs.ReadStat(pid)
		if err != nil || others[stat.Parent] {
			return true
		}
		pid = stat.Parent
	}
	return false
}

// pidFDThread is PIDFD_THREAD of linux/pidfd.h.
const pidFDThread = unix.O_EXCL

// isStdio reports whether a terminal is one of the container's stdio.
func isStdio(terminal uint64, stdio []*api.Stdio) bool {
	return terminal != 0 && slices.ContainsFunc(stdio, func(s *api.Stdio) bool {
		var rdev, dev uint64
		_, err := fmt.Sscanf(s.GetKey(), "tty[%x:%x]", &rdev, &dev)
		return err == nil && rdev == terminal
	})
}

// orphaned reports whether a process has become a child of the init of a PID
// namespace that is not the container's own.
func (c *Container) orphaned(p *Process) bool {
	if c.Root.PIDs[len(c.Root.PIDs)-1] == 1 || p.Parent == 0 {
		return false
	}
	if same, err := procfs.SameNamespace(p.Parent, c.Root.PID, "pid"); err != nil || !same {
		return false // an exec: its parent is the kata-agent
	}
	isInit, err := OwnPIDNamespace(p.Parent)
	return err == nil && isInit
}

// connected lists processes with open TCP connections to outside of the container
// that nobody has said anything about: a restore brings them back only at the
// same address, and only while their peers still have them. Those with both ends
// in the container are restored without anybody's asking.
func (c *Container) connected(o *api.CheckpointOptions) (out []Finding) {
	r := rule{Refused, errcode.TCPConnection, "", "close it and repeat the checkpoint, or create the container with the annotation kata-checkpoint.dev/tcp: " +
		"established to keep such connections, or close to close them"}
	connections := Outside(c.Connections)
	switch {
	case o.GetTcpClose():
		r = rule{class: Warning, advice: "it finds the connection closed after the restore"}
		connections = c.Connections
	case o.GetTcpEstablished():
		// There is nothing to keep a connection to an exec for, which ends with
		// the container.
		connections = slices.DeleteFunc(connections, func(conn Connection) bool { return conn.Exec == nil })
	}
	for _, conn := range c.Connections {
		if conn.Ended && !o.GetTcpEstablished() {
			out = append(out, c.finding(c.byPID(conn.PID), rule{class: Warning, what: fmt.Sprintf("has a TCP connection from %s that its peer %s has closed", conn.Local, conn.Remote), advice: "it finds the connection closed after the restore"}))
		}
	}
	count, elsewhere := make(map[int]int), make(map[int]bool)
	for _, conn := range connections {
		count[conn.PID]++
		if !conn.Here || conn.Exec != nil {
			elsewhere[conn.PID] = true
		}
	}
	for _, conn := range connections {
		n := count[conn.PID]
		if n == 0 {
			continue
		}
		count[conn.PID] = 0
		r := r
		r.what = fmt.Sprintf("has an open TCP connection from %s to %s", conn.Local, conn.Remote)
		switch {
		case conn.Exec != nil:
			r.what += ", to " + c.ofExec(conn.Exec)
			if r.class == Refused {
				r.advice = endExec + ", or create the container with the annotation kata-checkpoint.dev/tcp: close"
			}
		case !conn.Inside:
			r.what += " outside of the container"
		}
		if n > 1 {
			r.what += fmt.Sprintf(", and %d more", n-1)
		}
		f := c.finding(c.byPID(conn.PID), r)
		f.Stale = !elsewhere[conn.PID]
		out = append(out, f)
	}
	return out
}

// byPID returns one of the container's own processes.
func (c *Container) byPID(pid int) *Process {
	return c.Processes[slices.IndexFunc(c.Processes, func(p *Process) bool { return p.PID == pid })]
}

// endExec is the advice for what cannot be checkpointed while an exec runs.
const endExec = "repeat the checkpoint once the exec has ended, or terminate it"

// ofExec names a process that an exec has started.
func (c *Container) ofExec(p *Process) string {
	return "the process " + c.named(p) + ", which was started by an exec and is not part of a checkpoint"
}

// externalSockets finds unix sockets of the container that are connected to a
// process outside of it, or to one that an exec has started. A peer that no process has is left to CRIU: it may be
// in flight through another socket. Allowed are those that the caller allows and
// CRIU can connect again: datagram sockets, by the peer's name (criu/sk-unix.c,
// dump_external_sockets).
func (c *Container) externalSockets(allow bool) ([]Finding, error) {
	var out []Finding
	outside := make(map[uint32]*Process) // by the outer end's inode
	for inode, o := range c.sockets.owners {
		peer := c.sockets.unix[inode].peer
		if peer == 0 || o.process.Exec {
			continue
		}
		if other := c.sockets.unix[peer]; allow && other.datagram && other.named {
			continue
		}
		switch other := c.sockets.owners[peer].process; {
		case other == nil:
			outside[peer] = o.process
		case other.Exec:
			out = append(out, c.finding(o.process, rule{Refused, errcode.ExecPeer, "has a unix socket that is connected to " + c.ofExec(other), endExec}))
		}
	}
	if len(outside) == 0 {
		return out, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || slices.ContainsFunc(c.all(), func(p *Process) bool { return p.PID == pid }) {
			continue
		}
		// A process outside of the container may exit meanwhile.
		dir, err := procfs.OpenDir(pid, nil)
		if err != nil {
			continue
		}
		_ = links(dir, func(_ int, name string) error {
			if inode, ok := socketInode(name); ok && outside[inode] != nil {
				f := c.finding(outside[inode], rule{Refused, errcode.UnixSocket,
					fmt.Sprintf("has a unix socket that is connected to outside of the container, to the process %s (pid %d in the guest)", Name(pid), pid),
					"close the connection before the checkpoint"})
				f.Stale = true // it may be a new process of the container's
				out = append(out, f)
			}
			return nil
		})
		dir.Close()
	}
	return out, nil
}

func (c *Container) finding(p *Process, r rule) Finding {
	return Finding{Class: r.class, Code: r.code, Process: c.named(p), What: r.what, Advice: r.advice}
}

// Refuse is a finding about a process that forbids a checkpoint.
func (c *Container) Refuse(p *Process, code errcode.Code, what, advice string) Finding {
	return c.finding(p, rule{Refused, code, what, advice})
}

// named is a process's name and its PID in the container's PID namespace.
func (c *Container) named(p *Process) string {
	if depth := len(c.Root.PIDs); len(p.PIDs) >= depth {
		return fmt.Sprintf("%s (pid %d)", p.Name, p.PIDs[depth-1])
	}
	return fmt.Sprintf("%s (pid %d in the guest)", p.Name, p.PID)
}
