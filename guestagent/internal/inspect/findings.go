// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
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
	// Process names the process and its PID, as its own container shows it. It is
	// empty where a finding is about the container as a whole.
	Process string
	// What completes "the process P ..." or "the container ...", and Advice is
	// what to do about it.
	What, Advice string
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
// or nil if there are none.
func Refusal(findings []Finding) error {
	var texts []string
	for _, f := range findings {
		if f.Class == Refused {
			texts = append(texts, f.String())
		}
	}
	if len(texts) == 0 {
		return nil
	}
	if more := len(texts) - maxQuoted; more > 0 {
		texts = append(texts[:maxQuoted], fmt.Sprintf("and %d more like these", more))
	}
	return errclass.Precondition("%s", strings.Join(texts, "; "))
}

// Check compares what was read of a container with what CRIU can dump and
// restore: CRIU itself would fail later, and with a message deep in its log.
// Stdio is what the kata-agent gave to init. It returns each finding once for a
// process.
func (c *Container) Check(stdio []*api.Stdio, o *api.CheckpointOptions) ([]Finding, error) {
	var out []Finding
	for _, p := range c.Processes {
		if p != c.Root && c.orphaned(p) {
			out = append(out, c.finding(p, orphan))
		}
		if p.Tracer != 0 {
			out = append(out, c.finding(p, rule{Refused, "is traced by the process " + Name(p.Tracer) + ", and CRIU has to trace it itself", "detach the tracer"}))
		}
		if p.Headless {
			out = append(out, c.finding(p, headless))
		}
		for _, f := range p.Files {
			if r := classify(p, f, stdio); r.class != Good {
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
	out = append(out, c.nestedNamespaces()...)
	out = append(out, c.unusualSockets()...)
	if !o.GetExternalUnixSockets() {
		external, err := c.externalSockets()
		if err != nil {
			return nil, err
		}
		out = append(out, external...)
	}
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
	what, advice string
}

// anonymous is the table of descriptors without a file system, by the name that
// the kernel gives them: those that CRIU 4.2 can dump (criu/files.c,
// dump_one_file), and those that it is known not to.
var anonymous = map[string]rule{
	"[eventfd]":   {},
	"[eventpoll]": {},
	"[signalfd]":  {},
	"[timerfd]":   {},
	"[pidfd]":     {},
	"inotify":     {},
	"[fanotify]":  {},
	"bpf-map":     {},
	"[io_uring]":  {Refused, "uses io_uring, which CRIU cannot checkpoint", "run the program without io_uring"},
}

// anonInode starts the names of such descriptors and of their mappings.
const anonInode = "anon_inode:"

// controllingTTY is a process that has /dev/tty open: CRIU looks for the
// terminal only among those that the container has both ends of (criu/tty.c,
// tty_verify_ctty).
var controllingTTY = rule{Refused, "has /dev/tty open, as shells with job control do, which CRIU cannot checkpoint with the container's own terminal",
	"terminate it, or run the container without a terminal"}

// orphan is a process that has lost its parent in a PID namespace that is not
// its container's own. It is a child of that namespace's init then, and CRIU,
// which walks the tree from its root, does not see it.
var orphan = rule{Refused, "has lost its parent and is no longer a descendant of the container's init, below which CRIU looks for processes",
	"have init adopt orphans, as an init program does that is told to be a subreaper, or run the container with a pid namespace of its own (shareProcessNamespace: false)"}

// headless is a process whose main thread has called pthread_exit(3): CRIU
// copies what threads share from the main one (criu/cr-dump.c).
var headless = rule{Refused, "runs on after its main thread has exited, which CRIU cannot checkpoint", "have the main thread wait for the others"}

// classify finds the rule for a descriptor.
func classify(p *Process, f File, stdio []*api.Stdio) rule {
	if f.Name == "/dev/tty" && isStdio(p.Terminal, stdio) {
		return controllingTTY
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
func (c *Container) connected(o *api.CheckpointOptions) []Finding {
	r := rule{Refused, "", "close it and repeat the checkpoint, or create the container with the annotation kata-checkpoint.dev/tcp: " +
		"established to keep such connections, or close to close them"}
	connections := Outside(c.Connections)
	switch {
	case o.GetTcpClose():
		r = rule{Warning, "", "it finds the connection closed after the restore"}
		connections = c.Connections
	case o.GetTcpEstablished():
		return nil
	}
	count := make(map[int]int)
	for _, conn := range connections {
		count[conn.PID]++
	}
	var out []Finding
	for _, conn := range connections {
		n := count[conn.PID]
		if n == 0 {
			continue
		}
		count[conn.PID] = 0
		r.what = fmt.Sprintf("has an open TCP connection from %s to %s", conn.Local, conn.Remote)
		if !conn.Inside {
			r.what += " outside of the container"
		}
		if n > 1 {
			r.what += fmt.Sprintf(", and %d more", n-1)
		}
		i := slices.IndexFunc(c.Processes, func(p *Process) bool { return p.PID == conn.PID })
		out = append(out, c.finding(c.Processes[i], r))
	}
	return out
}

// externalSockets finds unix sockets of the container that are connected to a
// process outside of it. A peer that no process has is left to CRIU: it may be
// in flight through another socket.
func (c *Container) externalSockets() ([]Finding, error) {
	outside := make(map[uint32]*Process) // by the outer end's inode
	for inode, o := range c.sockets.owners {
		if peer := c.sockets.peers[inode]; peer != 0 && c.sockets.owners[peer].process == nil {
			outside[peer] = o.process
		}
	}
	if len(outside) == 0 {
		return nil, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []Finding
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || slices.ContainsFunc(c.Processes, func(p *Process) bool { return p.PID == pid }) {
			continue
		}
		// A process outside of the container may exit meanwhile.
		_ = links(pid, func(_ int, name string) error {
			if inode, ok := socketInode(name); ok && outside[inode] != nil {
				out = append(out, c.finding(outside[inode], rule{Refused,
					fmt.Sprintf("has a unix socket that is connected to outside of the container, to the process %s (pid %d in the guest)", Name(pid), pid),
					"close the connection before the checkpoint"}))
			}
			return nil
		})
	}
	return out, nil
}

func (c *Container) finding(p *Process, r rule) Finding {
	return Finding{Class: r.class, Process: c.named(p), What: r.what, Advice: r.advice}
}

// named is a process's name and its PID in the container's PID namespace.
func (c *Container) named(p *Process) string {
	if depth := len(c.Root.PIDs); len(p.PIDs) >= depth {
		return fmt.Sprintf("%s (pid %d)", p.Name, p.PIDs[depth-1])
	}
	return fmt.Sprintf("%s (pid %d in the guest)", p.Name, p.PID)
}
