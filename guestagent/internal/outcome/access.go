// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// CRIU opens files as root, whoever has them open afterwards. In a container that
// can never be root, they must be such as its users can open.

// Permissions, as in the mode of a file for others.
const (
	readable   = 4
	writable   = 2
	executable = 1
)

// opened checks that a process of the container can have opened a file that is on
// one of its mounts.
func (k *check) opened(pid int, fd string, f file) error {
	link := fmt.Sprintf("/proc/%d/fd/%s", pid, fd)
	what := fmt.Sprintf("the descriptor %s (%s)", fd, target(link))
	if f.isDevice() {
		return k.device(pid, what, f)
	}
	if override, err := k.able(capability.CAP_DAC_OVERRIDE, capability.CAP_SETUID); override || err != nil {
		return err
	}
	flags, err := openFlags(pid, fd)
	if err != nil {
		return err
	}
	if flags&unix.O_PATH != 0 {
		return nil
	}
	want := map[int]uint16{unix.O_RDONLY: readable, unix.O_WRONLY: writable, unix.O_RDWR: readable | writable}[flags&unix.O_ACCMODE]
	for _, one := range []uint16{readable, writable} {
		if want&one != 0 {
			if err := k.access(pid, what, link, f, one); err != nil {
				return err
			}
		}
	}
	return nil
}

func openFlags(pid int, fd string) (int, error) {
	path := fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(value), 8, 32)
			return int(flags), err
		}
	}
	return 0, fmt.Errorf("%s has no flags", path)
}

// access checks that a user of the container has one of the permissions that are
// wanted for a file.
func (k *check) access(pid int, what, link string, f file, want uint16) error {
	override, err := k.able(capability.CAP_DAC_OVERRIDE, capability.CAP_SETUID)
	if err == nil && !override && want&(readable|executable) != 0 {
		override, err = k.able(capability.CAP_DAC_READ_SEARCH)
	}
	if override || err != nil {
		return err
	}
	users, groups, err := k.ownIDs()
	if err != nil {
		return err
	}
	// The owner can change the mode. Whether a file is the group's does not matter
	// if it has an ACL: then these bits are the most that it gives to anybody.
	granted := f.mode
	if slices.Contains(groups, f.gid) || hasACL(link) {
		granted |= f.mode >> 3
	}
	if granted&want == 0 && !slices.Contains(users, f.uid) {
		k.find(pid, "has %s, which is the user %d's and has the mode %#o: the container cannot open it", what, f.uid, f.mode&0o7777)
	}
	return nil
}

// hasACL reports whether a file has an access control list.
func hasACL(link string) bool {
	_, err := unix.Getxattr(link, "system.posix_acl_access", nil)
	return err == nil
}

// ownIDs returns the users and groups of the container, without those that
// CAP_SETUID and CAP_SETGID allow it to become.
func (k *check) ownIDs() (users, groups []uint32, err error) {
	users, groups = []uint32{k.rights.uid}, append([]uint32{k.rights.gid}, k.rights.groups...)
	if k.rights.noNewPrivs {
		return users, groups, nil
	}
	p, err := k.readPrograms()
	if err != nil {
		return nil, nil, err
	}
	return append(users, p.users...), append(groups, p.groups...), nil
}

// isTerminal reports whether a device is the terminal of its process or one of
// pseudo-terminals, which say themselves who may open them
// (Documentation/admin-guide/devices.txt).
func isTerminal(kind uint16, number uint64) bool {
	major := unix.Major(number)
	return kind == unix.S_IFCHR && (number == unix.Mkdev(5, 0) || number == unix.Mkdev(5, 2) || major >= 136 && major <= 143)
}

// device checks that a device is one that the container has a node of, or can
// make one.
func (k *check) device(pid int, what string, f file) error {
	if isTerminal(f.kind(), f.node) || k.devices[deviceNode{f.kind(), f.node}] {
		return nil
	}
	if create, err := k.able(capability.CAP_MKNOD, capability.CAP_SYS_ADMIN); create || err != nil {
		return err
	}
	k.find(pid, "has %s, the device %d:%d, of which the container has no node", what, unix.Major(f.node), unix.Minor(f.node))
	return nil
}
