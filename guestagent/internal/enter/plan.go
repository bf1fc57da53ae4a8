package enter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// plan is all that the spawner and the children need, laid out so that they
// neither allocate nor call anything but the kernel. It holds no pointers: it
// and what follows it, its texts, go to another process, and an offset becomes
// an address there.
type plan struct {
	// offsets of texts that end with a zero byte, and of lists of such offsets
	// that end with a zero.
	cwd, oomPath uintptr
	argv, envv   uintptr
	// paths are to be tried one after the other.
	paths     [maxPaths]uintptr
	pathCount int

	oomValue, oomSize uintptr

	limits     [maxLimits]limit
	limitCount int

	uid, gid, umask    uintptr
	groups, groupCount uintptr

	header        unix.CapUserHeader
	caps          [2]unix.CapUserData
	drop, ambient uint64 // a bit a capability

	terminal, noNew, first bool
}

const (
	maxPaths  = 256
	maxLimits = 32
	// maxPlan is more than the kernel takes for a command and its environment by default.
	maxPlan = 4 << 20
)

type limit struct {
	resource uintptr
	value    unix.Rlimit
}

// image is a plan and its texts, as the spawner reads it.
type image struct{ data []byte }

func (m *image) align() {
	for len(m.data)%int(unsafe.Sizeof(uintptr(0))) != 0 {
		m.data = append(m.data, 0)
	}
}

func (m *image) text(s string) (uintptr, error) {
	if strings.IndexByte(s, 0) >= 0 {
		return 0, fmt.Errorf("exec: %q holds a zero byte", s)
	}
	at := uintptr(len(m.data))
	m.data = append(append(m.data, s...), 0)
	return at, nil
}

func (m *image) list(texts []string) (uintptr, error) {
	var offsets []byte
	for _, s := range texts {
		at, err := m.text(s)
		if err != nil {
			return 0, err
		}
		offsets = binary.NativeEndian.AppendUint64(offsets, uint64(at))
	}
	m.align()
	at := uintptr(len(m.data))
	m.data = append(m.data, binary.NativeEndian.AppendUint64(offsets, 0)...)
	return at, nil
}

// newImage lays out what the process in the request wants.
func newImage(target int, proc *specs.Process, first bool) ([]byte, error) {
	if len(proc.Args) == 0 {
		return nil, errors.New("exec: no command")
	}
	p := &plan{terminal: proc.Terminal, noNew: proc.NoNewPrivileges, first: first, uid: uintptr(proc.User.UID), gid: uintptr(proc.User.GID), umask: 0o022}
	if proc.User.Umask != nil {
		p.umask = uintptr(*proc.User.Umask)
	}
	size := int(unsafe.Sizeof(*p))
	m := &image{data: make([]byte, size, 4*size)}
	if err := p.texts(m, target, proc); err != nil {
		return nil, err
	}
	m.align()
	p.groups, p.groupCount = uintptr(len(m.data)), uintptr(len(proc.User.AdditionalGids))
	for _, g := range proc.User.AdditionalGids {
		m.data = binary.NativeEndian.AppendUint32(m.data, g)
	}
	if err := p.setLimits(proc.Rlimits); err != nil {
		return nil, err
	}
	if err := p.setCapabilities(proc.Capabilities); err != nil {
		return nil, err
	}
	if len(m.data) > maxPlan {
		return nil, fmt.Errorf("exec: %w", unix.E2BIG)
	}
	copy(m.data, unsafe.Slice((*byte)(unsafe.Pointer(p)), size))
	return m.data, nil
}

func (p *plan) texts(m *image, target int, proc *specs.Process) (err error) {
	env := environment(target, proc)
	paths := candidates(proc.Args[0], env)
	if len(paths) > maxPaths {
		return fmt.Errorf("exec: PATH has more than %d directories", maxPaths)
	}
	for i, path := range paths {
		if p.paths[i], err = m.text(path); err != nil {
			return err
		}
	}
	p.pathCount = len(paths)
	if p.argv, err = m.list(proc.Args); err != nil {
		return err
	}
	if p.envv, err = m.list(env); err != nil {
		return err
	}
	cwd := proc.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if p.cwd, err = m.text(cwd); err != nil {
		return err
	}
	if p.oomPath, err = m.text("/proc/self/oom_score_adj"); err != nil {
		return err
	}
	score := firstLine(fmt.Sprintf("/proc/%d/oom_score_adj", target))
	if proc.OOMScoreAdj != nil {
		score = strconv.Itoa(*proc.OOMScoreAdj)
	}
	p.oomSize = uintptr(len(score))
	p.oomValue, err = m.text(score)
	return err
}

// firstLine is empty where the file is gone: the process of it is then, too.
func firstLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
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
		if p.limitCount == maxLimits {
			return fmt.Errorf("exec: more than %d limits", maxLimits)
		}
		p.limits[p.limitCount] = limit{res, unix.Rlimit{Cur: l.Soft, Max: l.Hard}}
		p.limitCount++
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
	p.drop = (1<<(int(last)+1) - 1) &^ mask(in.Bounding)
	p.ambient = mask(in.Ambient)
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
