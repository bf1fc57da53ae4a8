// SPDX-License-Identifier: Apache-2.0

package enter

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// plan is all that the helper needs, in the order in which it needs it: strings,
// each with a zero byte at its end, a list with its length in front.
type plan struct {
	data []byte
	err  error
}

func (p *plan) text(s string) {
	if strings.IndexByte(s, 0) >= 0 {
		p.err = errclass.Join(p.err, fmt.Errorf("%q contains a zero byte", s))
	}
	p.data = append(append(p.data, s...), 0)
}

func (p *plan) number(n uint64) { p.text(strconv.FormatUint(n, 10)) }

func (p *plan) flag(set bool) {
	if set {
		p.number(1)
	} else {
		p.number(0)
	}
}

func (p *plan) texts(list []string) {
	p.number(uint64(len(list)))
	for _, s := range list {
		p.text(s)
	}
}

// newPlan lays out what the process in the request wants.
func newPlan(target int, proc *specs.Process, init bool) ([]byte, error) {
	if len(proc.Args) == 0 && !init {
		return nil, errors.New("no command")
	}
	p := &plan{}
	p.text(oomScore(target, proc))
	p.flag(proc.Terminal)
	if err := p.limits(proc.Rlimits); err != nil {
		return nil, err
	}
	if proc.Cwd == "" {
		p.text("/")
	} else {
		p.text(proc.Cwd)
	}
	umask := uint32(0o022)
	if proc.User.Umask != nil {
		umask = *proc.User.Umask
	}
	p.number(uint64(umask))
	p.flag(proc.NoNewPrivileges)
	p.number(uint64(len(proc.User.AdditionalGids)))
	for _, g := range proc.User.AdditionalGids {
		p.number(uint64(g))
	}
	p.number(uint64(proc.User.UID))
	p.number(uint64(proc.User.GID))
	if err := p.capabilities(proc.Capabilities); err != nil {
		return nil, err
	}
	if !init {
		env := environment(target, proc)
		p.texts(candidates(proc.Args[0], env))
		p.texts(proc.Args)
		p.texts(env)
	}
	return p.data, p.err
}

// filterPlan is what the plan begins with: seccomp filters, a number for each
// instruction.
func filterPlan(filters [][]unix.SockFilter) []byte {
	p := &plan{}
	p.number(uint64(len(filters)))
	for _, f := range filters {
		p.number(uint64(len(f)))
		for _, i := range f {
			p.number(uint64(i.Code)<<48 | uint64(i.Jt)<<40 | uint64(i.Jf)<<32 | uint64(i.K))
		}
	}
	return p.data
}

// oomScore is the process's own or the target's; empty where the target has
// exited.
func oomScore(target int, proc *specs.Process) string {
	if proc.OOMScoreAdj != nil {
		return strconv.Itoa(*proc.OOMScoreAdj)
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", target))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// resources are the names of limits in the OCI spec (setrlimit(2)).
var resources = map[string]uint64{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

func (p *plan) limits(in []specs.POSIXRlimit) error {
	p.number(uint64(len(in)))
	for _, l := range in {
		resource, ok := resources[l.Type]
		if !ok {
			return fmt.Errorf("unknown limit %q", l.Type)
		}
		p.number(resource)
		p.number(l.Soft)
		p.number(l.Hard)
	}
	return nil
}

// capabilities lays out the sets as masks. Without any in the request the
// process has none.
func (p *plan) capabilities(in *specs.LinuxCapabilities) error {
	if in == nil {
		in = &specs.LinuxCapabilities{}
	}
	last, err := capability.LastCap()
	if err != nil {
		return err
	}
	known := make(map[string]capability.Cap)
	for _, c := range capability.ListKnown() {
		known["CAP_"+strings.ToUpper(c.String())] = c
	}
	for _, set := range [][]string{in.Bounding, in.Effective, in.Permitted, in.Inheritable, in.Ambient} {
		var mask uint64
		for _, name := range set {
			// A capability that the guest's kernel does not know cannot be given;
			// container runtimes leave such out, too.
			if c, ok := known[strings.ToUpper(name)]; ok && c <= last {
				mask |= 1 << c
			}
		}
		p.number(mask)
	}
	return nil
}
