// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// set is a set of capabilities.
type set uint64

func (s set) has(c capability.Cap) bool { return s&(1<<c) != 0 }

// String names the capabilities, as in "CAP_CHOWN, CAP_KILL".
func (s set) String() string {
	var names []string
	for _, c := range capability.ListKnown() {
		if s.has(c) {
			names = append(names, "CAP_"+strings.ToUpper(c.String()))
			s &^= 1 << c
		}
	}
	for ; s != 0; s &= s - 1 {
		names = append(names, fmt.Sprintf("%d", bits.TrailingZeros64(uint64(s))))
	}
	return strings.Join(names, ", ")
}

func setOf(names []string) (s set) {
	for _, c := range capability.ListKnown() {
		if slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, "CAP_"+c.String()) }) {
			s |= 1 << c
		}
	}
	return s
}

// rights are those that a container's specification gives to its init.
type rights struct {
	bounding, permitted, inheritable, ambient set
	noNewPrivs                                bool
	uid, gid                                  uint32
	groups                                    []uint32
}

func newRights(r *api.Rights, placeholder *credentials) rights {
	own := rights{
		bounding: placeholder.bounding, permitted: placeholder.permitted, inheritable: placeholder.inheritable, ambient: placeholder.ambient,
		noNewPrivs: placeholder.noNewPrivs, uid: placeholder.uids[0], gid: placeholder.gids[0], groups: placeholder.groups,
	}
	if r == nil {
		return own
	}
	out := rights{noNewPrivs: placeholder.noNewPrivs, uid: r.GetUid(), gid: r.GetGid(), groups: r.GetGroups()}
	if len(out.groups) == 0 {
		out.groups = own.groups // which Kata leaves as they are
	}
	for _, s := range []struct {
		set   *set
		names []string
	}{{&out.bounding, r.GetCapabilities()}, {&out.permitted, r.GetPermitted()}, {&out.inheritable, r.GetInheritable()}, {&out.ambient, r.GetAmbient()}} {
		// Kata may have taken away some.
		*s.set = setOf(s.names) & own.bounding
	}
	return out
}

// permissible returns what the permitted set of a process of the container can
// be, see capabilities(7), "Transformation of capabilities during execve()" and
// cap_bprm_creds_from_file in the kernel's security/commoncap.c.
func (r *rights) permissible(programs func() (*programs, error)) (set, error) {
	most := r.bounding | r.inheritable | r.ambient
	switch {
	case !r.noNewPrivs: // by a set-user-ID program, or one with file capabilities
		return most, nil
	case r.uid == 0:
		return most & r.permitted, nil
	}
	// A program other than root's keeps the ambient ones, and those of init that
	// the program's file has as well.
	if r.permitted&^r.ambient == 0 {
		return r.ambient, nil
	}
	p, err := programs()
	if err != nil {
		return 0, err
	}
	return r.ambient | r.permitted&p.capabilities, nil
}

// programs are what the executables of the restored processes can give.
type programs struct {
	capabilities set // of the files
	users        []uint32
	groups       []uint32
}

// readPrograms reads the executables of processes that are on one of the
// container's own file systems: others came with the image set.
func readPrograms(processes []int, container *table) (*programs, error) {
	out := &programs{}
	devices := container.devices()
	for _, pid := range processes {
		exe := fmt.Sprintf("/proc/%d/exe", pid)
		f, err := look(exe)
		if errors.Is(err, unix.ENOENT) {
			continue // it has exited
		}
		if err != nil {
			return nil, err
		}
		if !devices[[2]int{int(unix.Major(f.device)), int(unix.Minor(f.device))}] {
			continue
		}
		if f.mode&unix.S_ISUID != 0 {
			out.users = append(out.users, f.uid)
		}
		if f.mode&unix.S_ISGID != 0 {
			out.groups = append(out.groups, f.gid)
		}
		out.capabilities |= fileCapabilities(exe)
	}
	return out, nil
}

// fileCapabilities returns the capabilities of a file, none where it has none or
// its file system knows of none (linux/capability.h, vfs_cap_data).
func fileCapabilities(path string) set {
	var data [24]byte
	n, err := unix.Getxattr(path, "security.capability", data[:])
	if err != nil || n < 20 {
		return 0
	}
	word := func(i int) set { return set(binary.LittleEndian.Uint32(data[4*i:])) }
	permitted, inheritable := word(1)|word(3)<<32, word(2)|word(4)<<32
	return permitted | inheritable
}

func (k *check) readPrograms() (_ *programs, err error) {
	if k.programs == nil {
		k.programs, err = readPrograms(k.processes, k.mounts)
	}
	return k.programs, err
}

// able reports whether a process of the container can have had one of several
// capabilities.
func (k *check) able(caps ...capability.Cap) (bool, error) {
	most, err := k.rights.permissible(k.readPrograms)
	return slices.ContainsFunc(caps, most.has), err
}

// credentials are what a thread is allowed to do.
type credentials struct {
	exited                                               bool
	uids, gids                                           []uint32 // real, effective, saved, of the file system
	groups                                               []uint32
	inheritable, permitted, effective, bounding, ambient set
	noNewPrivs                                           bool
	// seccomp is 2 if system calls are filtered, by so many filters.
	seccomp, filters uint64
}

func readCredentials(pid, tid int) (credentials, error) {
	path := fmt.Sprintf("/proc/%d/task/%d/status", pid, tid)
	data, err := os.ReadFile(path)
	if err != nil {
		return credentials{}, err
	}
	t, err := parseCredentials(string(data))
	if err != nil {
		return credentials{}, fmt.Errorf("parse %s: %w", path, err)
	}
	return t, nil
}

func parseCredentials(status string) (t credentials, err error) {
	numbers := func(value string) (out []uint32) {
		for field := range strings.FieldsSeq(value) {
			n, e := strconv.ParseUint(field, 10, 32)
			err = errclass.Join(err, e)
			out = append(out, uint32(n))
		}
		return out
	}
	number := func(value string, base int) uint64 {
		n, e := strconv.ParseUint(value, base, 64)
		err = errclass.Join(err, e)
		return n
	}
	seen := make(map[string]bool)
	for line := range strings.Lines(status) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		seen[name] = true
		switch name {
		case "State":
			t.exited = strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X")
		case "Uid":
			t.uids = numbers(value)
		case "Gid":
			t.gids = numbers(value)
		case "Groups":
			t.groups = numbers(value)
		case "CapInh":
			t.inheritable = set(number(value, 16))
		case "CapPrm":
			t.permitted = set(number(value, 16))
		case "CapEff":
			t.effective = set(number(value, 16))
		case "CapBnd":
			t.bounding = set(number(value, 16))
		case "CapAmb":
			t.ambient = set(number(value, 16))
		case "NoNewPrivs":
			t.noNewPrivs = number(value, 10) != 0
		case "Seccomp":
			t.seccomp = number(value, 10)
		case "Seccomp_filters":
			t.filters = number(value, 10)
		}
	}
	// Seccomp is missing in a kernel without it.
	for _, name := range []string{"State", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"} {
		if !seen[name] {
			err = errclass.Join(err, fmt.Errorf("no %s", name))
		}
	}
	if err == nil && (len(t.uids) != 4 || len(t.gids) != 4) {
		err = errors.New("not four numbers in Uid or Gid")
	}
	return t, err
}

// thread checks a thread of a process.
func (k *check) thread(pid int, t *credentials) error {
	r := &k.rights
	most, err := r.permissible(k.readPrograms)
	if err != nil {
		return err
	}
	inheritable := r.inheritable | most
	if most.has(capability.CAP_SETPCAP) {
		inheritable |= r.bounding
	}
	for _, c := range []struct {
		name      string
		have, may set
	}{
		{"", t.effective | t.permitted | t.ambient, most},
		{" in its bounding set", t.bounding, r.bounding},
		{" in its inheritable set", t.inheritable, inheritable},
	} {
		if more := c.have &^ c.may; bits.OnesCount64(uint64(more)) == 1 {
			k.find(pid, "has the capability %s%s, which the container does not", more, c.name)
		} else if more != 0 {
			k.find(pid, "has the capabilities %s%s, which the container does not", more, c.name)
		}
	}
	if err := k.ids(pid, t, most); err != nil {
		return err
	}
	if k.placeholder.noNewPrivs && !t.noNewPrivs {
		k.find(pid, "lacks no_new_privs, which the container has")
	}
	if t.seccomp < k.placeholder.seccomp || t.filters < k.placeholder.filters {
		k.find(pid, "lacks the seccomp filter of the container")
	}
	return nil
}

// ids checks the users and groups of a thread.
func (k *check) ids(pid int, t *credentials, most set) error {
	foreign := func(have, own []uint32, change capability.Cap) (out []uint32) {
		for _, id := range have {
			if !most.has(change) && !slices.Contains(own, id) {
				out = append(out, id)
			}
		}
		return out
	}
	have := append(slices.Clone(t.gids), t.groups...)
	// The programs are asked for what the container lacks only.
	if len(foreign(t.uids, []uint32{k.rights.uid}, capability.CAP_SETUID))+len(foreign(have, append([]uint32{k.rights.gid}, k.rights.groups...), capability.CAP_SETGID)) == 0 {
		return nil
	}
	users, groups, err := k.ownIDs()
	if err != nil {
		return err
	}
	for _, id := range foreign(t.uids, users, capability.CAP_SETUID) {
		k.find(pid, "has the user %d, which the container cannot become", id)
	}
	for _, id := range foreign(have, groups, capability.CAP_SETGID) {
		k.find(pid, "has the group %d, which the container cannot become", id)
	}
	return nil
}
