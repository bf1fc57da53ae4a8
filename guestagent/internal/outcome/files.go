// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// file is where an open file is, and who may open it.
type file struct {
	mount    uint64 // the ID of its mount
	device   uint64 // of its file system
	inode    uint64
	node     uint64 // of a device node, which device it is
	mode     uint16
	uid, gid uint32
}

func (f file) kind() uint16 { return f.mode & unix.S_IFMT }

func (f file) isDevice() bool { return f.kind() == unix.S_IFCHR || f.kind() == unix.S_IFBLK }

// look finds out where a link in /proc leads. It asks the kernel only, and never
// the server of a file system.
func look(link string) (file, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID|unix.STATX_BASIC_STATS, &st); err != nil {
		return file{}, &os.PathError{Op: "statx", Path: link, Err: err}
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return file{}, &os.PathError{Op: "statx", Path: link, Err: errors.New("the kernel reports no mount ID")}
	}
	return file{
		mount: st.Mnt_id, device: unix.Mkdev(st.Dev_major, st.Dev_minor), inode: st.Ino,
		node: unix.Mkdev(st.Rdev_major, st.Rdev_minor), mode: st.Mode, uid: st.Uid, gid: st.Gid,
	}, nil
}

// unnamedMemory returns the mounts that memory without a file is on: they are the
// kernel's, and no process can reach a file by them.
func unnamedMemory() (map[uint64]bool, error) {
	out := make(map[uint64]bool)
	// MAP_ANONYMOUS with MAP_SHARED, System V segments and memfds share one;
	// huge pages have one for each size.
	for _, flags := range []int{0, unix.MFD_HUGETLB, unix.MFD_HUGETLB | unix.MFD_HUGE_2MB, unix.MFD_HUGETLB | unix.MFD_HUGE_1GB} {
		fd, err := unix.MemfdCreate("look", unix.MFD_CLOEXEC|flags)
		if err != nil && flags != 0 {
			continue // no pages of this size
		}
		if err != nil {
			return nil, fmt.Errorf("create a memfd: %w", err)
		}
		f, err := look(fmt.Sprintf("/proc/self/fd/%d", fd))
		unix.Close(fd)
		if err != nil {
			return nil, err
		}
		out[f.mount] = true
	}
	return out, nil
}

// aioMagic is the type of the file system of the rings of io_setup(2) (fs/aio.c).
const aioMagic = 0xa10a10a1

// kernelOnly are file systems that only the kernel can mount (SB_NOUSER): what is
// on them has no name anywhere.
var kernelOnly = []int64{unix.PIPEFS_MAGIC, unix.SOCKFS_MAGIC, unix.ANON_INODE_FS_MAGIC, unix.NSFS_MAGIC, unix.PID_FS_MAGIC, aioMagic}

// within reports whether a file that a link in /proc leads to is one of the
// container's: on one of its mounts, without a name, or its stdio.
func (k *check) within(link string, f file) bool {
	if k.mountIDs[f.mount] || k.memory[f.mount] || k.known[f.mount] || slices.Contains(k.stdio, f) {
		return true
	}
	// The mount is not the container's. Ask for its kind.
	var st unix.Statfs_t
	if err := unix.Statfs(link, &st); err != nil || !slices.Contains(kernelOnly, int64(st.Type)) { //nolint:unconvert // of another width elsewhere
		return false
	}
	if k.known == nil {
		k.known = make(map[uint64]bool)
	}
	k.known[f.mount] = true
	return true
}

// files checks what a process has open and mapped.
func (k *check) files(pid int) error {
	for _, l := range []struct{ name, what string }{{"root", "its root"}, {"cwd", "its working directory"}, {"exe", "its program"}} {
		link := fmt.Sprintf("/proc/%d/%s", pid, l.name)
		f, err := look(link)
		if err != nil {
			return err
		}
		if !k.within(link, f) {
			k.find(pid, "has %s outside of the container (%s)", l.what, target(link))
		}
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return err
	}
	for _, e := range entries {
		link := fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name())
		f, err := look(link)
		if err != nil {
			return err
		}
		if !k.within(link, f) {
			k.find(pid, "has the descriptor %s outside of the container (%s)", e.Name(), target(link))
			continue
		}
		if err := k.unnamed(pid, e.Name()); err != nil {
			return err
		}
		if k.mountIDs[f.mount] && !slices.Contains(k.stdio, f) {
			if err := k.opened(pid, e.Name(), f); err != nil {
				return err
			}
		}
	}
	return k.mappings(pid)
}

func target(link string) string {
	name, err := os.Readlink(link)
	if err != nil {
		return "?"
	}
	return strconv.QuoteToGraphic(name)
}

// unnamed checks a descriptor that stands for something other than a file: only
// some can be had without a capability, or lead out of the container.
func (k *check) unnamed(pid int, fd string) error {
	link := fmt.Sprintf("/proc/%d/fd/%s", pid, fd)
	name, err := os.Readlink(link)
	if err != nil {
		return err
	}
	kind, rest, _ := strings.Cut(name, ":")
	switch {
	case strings.HasPrefix(name, "/"), kind == "pipe":
	case kind == "socket":
		return k.socket(pid, fd)
	case kind == "pidfd", name == "anon_inode:[pidfd]":
		return k.pidfd(pid, fd)
	case kind == "anon_inode":
		return k.needs(pid, fd, strings.Trim(rest, "[]"))
	case strings.HasPrefix(rest, "["): // of a namespace
		if !k.spaces[name] {
			k.find(pid, "has the descriptor %s of a namespace that is not the container's (%s)", fd, name)
		}
	}
	return nil
}

// capabilitiesFor are the capabilities one of which it takes to create a
// descriptor.
var capabilitiesFor = map[string][]capability.Cap{
	"fanotify": {capability.CAP_SYS_ADMIN},
	"bpf-map":  {capability.CAP_BPF, capability.CAP_SYS_ADMIN},
	"bpf-prog": {capability.CAP_BPF, capability.CAP_SYS_ADMIN},
	"RAW":      {capability.CAP_NET_RAW},
	"RAWv6":    {capability.CAP_NET_RAW},
	"PACKET":   {capability.CAP_NET_RAW},
	"PING":     {capability.CAP_NET_RAW},
	"PINGv6":   {capability.CAP_NET_RAW},
}

// PingGroups has the groups, from the first to the last, that may make ping
// sockets in the calling thread's network namespace. Nobody may by default.
const PingGroups = "/proc/sys/net/ipv4/ping_group_range"

// pingAllowed reports whether some groups may make ping sockets, whatever their
// capabilities.
func pingAllowed() bool {
	data, err := os.ReadFile(PingGroups)
	if err != nil {
		return false
	}
	var first, last uint64
	_, err = fmt.Sscan(string(data), &first, &last)
	return err == nil && first <= last
}

func (k *check) needs(pid int, fd, kind string) error {
	caps := capabilitiesFor[kind]
	if len(caps) == 0 || strings.HasPrefix(kind, "PING") && pingAllowed() {
		return nil
	}
	most, err := k.rights.permissible(k.readPrograms)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(caps, most.has) {
		k.find(pid, "has the descriptor %s of the kind %s, for which the container lacks %s", fd, kind, set(1<<caps[0]))
	}
	return nil
}

func (k *check) socket(pid int, fd string) error {
	var kind [64]byte
	n, err := unix.Getxattr(fmt.Sprintf("/proc/%d/fd/%s", pid, fd), "system.sockprotoname", kind[:])
	if err != nil {
		return fmt.Errorf("kind of the socket %s of process %d: %w", fd, pid, err)
	}
	return k.needs(pid, fd, strings.TrimRight(string(kind[:n]), "\x00"))
}

// pidfd checks that a descriptor of a process is of one of the container's own.
func (k *check) pidfd(pid int, fd string) error {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		value, ok := strings.CutPrefix(line, "Pid:")
		if !ok {
			continue
		}
		// -1 of one that has exited.
		of, err := strconv.Atoi(strings.TrimSpace(value))
		if err != nil {
			return err
		}
		if of <= 0 {
			continue
		}
		// A zombie has its PID namespace still.
		space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", of))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if !k.spaces[space] {
			k.find(pid, "has the descriptor %s of a process that is not the container's", fd)
		}
	}
	return nil
}

// mapped is a file as the memory map of a process shows it.
type mapped struct{ device, inode string }

// mappings checks the files that a process has mapped.
func (k *check) mappings(pid int) error {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	defer maps.Close()
	if k.seen == nil {
		k.seen = make(map[mapped]bool)
	}
	s := bufio.NewScanner(maps)
	s.Buffer(nil, 1<<16)
	for s.Scan() {
		// Addresses, permissions, offset, device, inode, and the path.
		fields := strings.Fields(s.Text())
		if len(fields) < 5 || fields[4] == "0" {
			continue
		}
		// Through another mapping of the same file the process reads the same. It
		// cannot write to it through a private one.
		m, shared := mapped{fields[3], fields[4]}, strings.HasSuffix(fields[1], "s")
		if k.seen[m] && !shared {
			continue
		}
		link := fmt.Sprintf("/proc/%d/map_files/%s", pid, inspect.MapFilesName(fields[0]))
		f, err := look(link)
		if err != nil {
			return err
		}
		if !k.within(link, f) {
			k.find(pid, "has mapped a file outside of the container (%s)", target(link))
			continue
		}
		if k.mountIDs[f.mount] {
			// What can be executed can be mapped.
			want := uint16(readable | executable)
			if shared && strings.Contains(fields[1], "w") {
				want = writable
			}
			if err := k.access(pid, "mapped "+target(link), link, f, want); err != nil {
				return err
			}
		}
		k.seen[m] = true
	}
	return s.Err()
}
