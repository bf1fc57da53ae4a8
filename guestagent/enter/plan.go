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
)

// plan is all that the children need, laid out so that they neither allocate
// nor call anything but the kernel.
type plan struct {
	pidfd  uintptr
	cgroup uintptr
	report uintptr
	read   *os.File
	files  []*os.File

	stdio    [3]uintptr
	terminal bool

	cwd   *byte
	paths []*byte
	argv  []*byte
	envv  []*byte

	oomPath  *byte
	oomValue []byte

	limits []limit
	uid    uintptr
	gid    uintptr
	groups []uint32
	umask  uintptr

	dropCaps []uintptr
	ambient  []uintptr
	header   unix.CapUserHeader
	caps     [2]unix.CapUserData
	noNew    bool
}

type limit struct {
	resource uintptr
	value    unix.Rlimit
}

func newPlan(r Request) (_ *plan, err error) {
	proc := r.Process
	if proc == nil || len(proc.Args) == 0 {
		return nil, errors.New("exec: no command")
	}
	p := &plan{terminal: proc.Terminal, noNew: proc.NoNewPrivileges, uid: uintptr(proc.User.UID), gid: uintptr(proc.User.GID), groups: proc.User.AdditionalGids}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	p.umask = 0o022
	if proc.User.Umask != nil {
		p.umask = uintptr(*proc.User.Umask)
	}
	if err := p.open(r); err != nil {
		return nil, err
	}
	if err := p.texts(r); err != nil {
		return nil, err
	}
	if err := p.setLimits(proc.Rlimits); err != nil {
		return nil, err
	}
	return p, p.setCapabilities(proc.Capabilities)
}

func (p *plan) open(r Request) error {
	pidfd, err := unix.PidfdOpen(r.Target, 0)
	if err != nil {
		return fmt.Errorf("exec: the container's process: %w", err)
	}
	p.pidfd = p.keep(os.NewFile(uintptr(pidfd), "target"))
	procs, err := os.OpenFile(r.Cgroup+"/cgroup.procs", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	p.cgroup = p.keep(procs)
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	p.read, p.report = read, p.keep(write)
	for i, f := range r.Stdio {
		// Clear of 0 to 2, which the child overwrites one by one.
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return fmt.Errorf("exec: stdio: %w", err)
		}
		p.stdio[i] = p.keep(os.NewFile(uintptr(fd), f.Name()))
	}
	return nil
}

func (p *plan) keep(f *os.File) uintptr {
	p.files = append(p.files, f)
	return f.Fd()
}

func (p *plan) close() {
	for _, f := range p.files {
		f.Close()
	}
	p.files = nil
}

func (p *plan) texts(r Request) (err error) {
	pointers := func(in []string) []*byte {
		var out []*byte
		for _, s := range in {
			b, e := unix.BytePtrFromString(s)
			if e != nil {
				err = fmt.Errorf("exec: %q holds a zero byte: %w", s, e)
				return nil
			}
			out = append(out, b)
		}
		return out
	}
	env := environment(r)
	p.paths = pointers(candidates(r.Process.Args[0], env))
	p.argv = append(pointers(r.Process.Args), nil)
	p.envv = append(pointers(env), nil)
	cwd := r.Process.Cwd
	if cwd == "" {
		cwd = "/"
	}
	rest := pointers([]string{cwd, "/proc/self/oom_score_adj"})
	if err != nil {
		return err
	}
	p.cwd, p.oomPath = rest[0], rest[1]
	p.oomValue = []byte(strconv.Itoa(r.OOMScoreAdj))
	return nil
}

// resources are the names of limits in the OCI spec (setrlimit(2)).
var resources = map[string]uintptr{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

func (p *plan) setLimits(in []specs.POSIXRlimit) error {
	for _, l := range in {
		res, ok := resources[l.Type]
		if !ok {
			return fmt.Errorf("exec: unknown limit %q", l.Type)
		}
		p.limits = append(p.limits, limit{res, unix.Rlimit{Cur: l.Soft, Max: l.Hard}})
	}
	return nil
}

// setCapabilities lays out the sets. Without any in the request the process
// has none.
func (p *plan) setCapabilities(in *specs.LinuxCapabilities) error {
	if in == nil {
		in = &specs.LinuxCapabilities{}
	}
	last, err := capability.LastCap()
	if err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	known := make(map[string]int)
	for _, c := range capability.ListKnown() {
		known["CAP_"+strings.ToUpper(c.String())] = int(c)
	}
	mask := func(names []string) (m uint64) {
		for _, n := range names {
			// A capability that the guest's kernel does not know cannot be given;
			// container runtimes leave such out, too.
			if c, ok := known[strings.ToUpper(n)]; ok && c <= int(last) {
				m |= 1 << c
			}
		}
		return m
	}
	bounding, ambient := mask(in.Bounding), mask(in.Ambient)
	for c := range int(last) + 1 {
		if bounding&(1<<c) == 0 {
			p.dropCaps = append(p.dropCaps, uintptr(c))
		}
		if ambient&(1<<c) != 0 {
			p.ambient = append(p.ambient, uintptr(c))
		}
	}
	p.header = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	effective, permitted, inheritable := mask(in.Effective), mask(in.Permitted), mask(in.Inheritable)
	for i := range p.caps {
		shift := 32 * i
		p.caps[i] = unix.CapUserData{
			Effective:   uint32(effective >> shift),   //nolint:gosec // one half
			Permitted:   uint32(permitted >> shift),   //nolint:gosec // one half
			Inheritable: uint32(inheritable >> shift), //nolint:gosec // one half
		}
	}
	return nil
}
