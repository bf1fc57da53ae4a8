// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// kernelFS are file systems that CRIU mounts again at restore, whatever
// superblock the container had: they show the kernel's state, not files.
var kernelFS = []string{"proc", "sysfs", "mqueue", "devpts", "securityfs", "binfmt_misc", "pstore", "tracefs", "debugfs"}

// Mounts reads the mounts in the mount namespace of a process.
func Mounts(pid int) ([]*mountinfo.Info, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	return mountinfo.GetMountsFromReader(bytes.NewReader(data), nil)
}

// restorableFS are file systems that CRIU mounts again with what was in them, or
// that have no content of their own (criu/filesystems.c).
var restorableFS = append([]string{"tmpfs", "devtmpfs", "cgroup2", "cgroup", "fusectl", "configfs"}, kernelFS...)

// Point is a mount that a container was created with.
type Point struct {
	Path string `json:"path"`
	// Root is the directory or file of the file system that it shows, and Type and
	// Device are those of the file system. In a record of an agent that did not note
	// them, they are empty.
	Root   string `json:"root,omitempty"`
	Type   string `json:"type,omitempty"`
	Device uint64 `json:"device,omitempty"`
}

// NewPoint describes a mount.
func NewPoint(m *mountinfo.Info) Point {
	return Point{Path: m.Mountpoint, Root: m.Root, Type: m.FSType, Device: number(m)}
}

// UnmarshalJSON also accepts the path alone, which earlier agents have noted.
func (p *Point) UnmarshalJSON(data []byte) error {
	if path := ""; json.Unmarshal(data, &path) == nil {
		*p = Point{Path: path}
		return nil
	}
	type plain Point
	return json.Unmarshal(data, (*plain)(p))
}

// is reports whether a mount is the one that the container was created with. A
// file system that CRIU mounts again has another device after a restore.
func (p Point) is(m *mountinfo.Info) bool {
	switch {
	case m.Mountpoint != p.Path:
		return false
	case p.Type == "":
		return true
	case m.FSType != p.Type:
		return false
	case m.FSType == "devpts": // a terminal has another number after a restore
		return true
	case m.FSType != "devtmpfs" && slices.Contains(restorableFS, m.FSType):
		return m.Root == p.Root
	}
	return m.Root == p.Root && number(m) == p.Device
}

// number is the device number of a mount's file system.
func number(m *mountinfo.Info) uint64 {
	return unix.Mkdev(uint32(m.Major), uint32(m.Minor)) //nolint:gosec // device numbers
}

// Given returns the mounts that a container was created with. The others were
// made by its own programs.
func Given(mounts []*mountinfo.Info, points []Point) []*mountinfo.Info {
	if points == nil {
		return mounts
	}
	seen := make(map[string]bool)
	var out []*mountinfo.Info
	for _, m := range mounts {
		// A second mount at the same point covers the first.
		if !seen[m.Mountpoint] && slices.ContainsFunc(points, func(p Point) bool { return p.is(m) }) {
			out = append(out, m)
		}
		seen[m.Mountpoint] = true
	}
	return out
}

// CheckMounts finds what a container's own programs have done to its mounts, in
// any mount namespace of theirs, that CRIU cannot restore. Marked are the
// destinations of mounts that the caller keeps out of the image set.
func (c *Container) CheckMounts(marked []string) (findings []Finding, err error) {
	for _, m := range Given(c.mounts.root, c.points) {
		if text.Line(m.Mountpoint, unix.PathMax) != m.Mountpoint {
			findings = append(findings, Finding{Class: Refused, Code: errcode.MountName,
				What:   fmt.Sprintf("has a mount at %s, a name with characters that cannot be printed", shown(m.Mountpoint)),
				Advice: "create it with the mount at another path"})
		}
	}
	if c.points == nil {
		return findings, nil
	}
	given := Given(c.mounts.root, c.points)
	findings = append(findings, madeMounts(c.mounts.root, given)...)
	seen := make(map[int]bool)
	for _, m := range c.mounts.root {
		seen[m.ID] = true
	}
	var nested []*mountinfo.Info
	for _, id := range slices.Sorted(maps.Keys(c.mounts.ids)) {
		if !seen[id] {
			nested = append(nested, c.mounts.ids[id])
		}
	}
	findings = append(findings, madeMounts(nested, given)...)
	external, err := c.externals(marked)
	if err != nil {
		return nil, err
	}
	findings = append(findings, covered(c.mounts.root, c.points, external)...)
	findings = append(findings, slaves(c.mounts.root, nested, external)...)
	spaces, err := c.mountNamespaces()
	if err != nil {
		return nil, err
	}
	findings = append(findings, c.lostProc(spaces)...)
	detached, err := c.detached(spaces)
	if err != nil {
		return nil, err
	}
	findings = append(findings, detached...)
	return distinct(append(findings, c.underCovered(spaces)...)), nil
}

// externals are the container's mounts that the image set does not contain.
func (c *Container) externals(marked []string) ([]*api.External, error) {
	guest, err := Mounts(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the guest: %w", err)
	}
	return Externals(Given(c.mounts.root, c.points), guest, marked), nil
}

// covered finds mounts that a container's own programs have made right on top of
// an external one. CRIU takes a mount for external by its path
// (try_resolve_ext_mount in criu/mount.c): both would be the external one after a
// restore. /dev/shm has a rule of its own, see [Container.CheckShm].
func covered(mounts []*mountinfo.Info, points []Point, external []*api.External) (findings []Finding) {
	at := make(map[string]int)
	for _, p := range points {
		at[p.Path]--
	}
	for _, m := range mounts {
		at[m.Mountpoint]++
	}
	for _, e := range external {
		path := e.GetDestination()
		if at[path] <= 0 || path == ShmDir {
			continue
		}
		findings = append(findings, Finding{Class: Refused, Code: errcode.MountCovered,
			What:   fmt.Sprintf("has mounted something over its mount %s, which CRIU cannot tell from that one", path),
			Advice: "unmount it before the checkpoint, or mount it elsewhere"})
	}
	return findings
}

// slaves finds mounts that are slaves of one that is in none of the container's
// mount namespaces. CRIU makes a slave of the root of such a one, or of an external
// mount, as long as that is a slave of the same one itself (resolve_shared_mounts
// in criu/mount.c): a bind of the root no longer is one once the root is private.
func slaves(root, nested []*mountinfo.Info, external []*api.External) (findings []Finding) {
	type view struct {
		device uint64
		master string
	}
	peers, sources := make(map[string]bool), make(map[view][]string)
	for i, m := range append(slices.Clone(root), nested...) {
		peers[propagation(m, "shared")] = true
		isSource := m.Mountpoint == "/" || slices.ContainsFunc(external, func(e *api.External) bool {
			return !e.GetDevice() && e.GetDestination() == m.Mountpoint
		})
		if i < len(root) && isSource {
			v := view{number(m), propagation(m, "master")}
			sources[v] = append(sources[v], m.Root)
		}
	}
	for _, m := range append(slices.Clone(root), nested...) {
		master := propagation(m, "master")
		if master == "" || peers[master] || slices.ContainsFunc(sources[view{number(m), master}], func(from string) bool { return isBelow(m.Root, from) }) {
			continue
		}
		findings = append(findings, Finding{Class: Refused, Code: errcode.MountSlave,
			What:   fmt.Sprintf("has a mount at %s that is a slave of one outside of the container, unlike the mount that it is a bind of, which CRIU cannot restore", shown(m.Mountpoint)),
			Advice: "make it private before the checkpoint, as by mount --make-private"})
	}
	return findings
}

// propagation is the ID of the peer group that a mount is in ("shared"), or is a
// slave of ("master"); empty: there is none.
func propagation(m *mountinfo.Info, kind string) string {
	for field := range strings.FieldsSeq(m.Optional) {
		if id, ok := strings.CutPrefix(field, kind+":"); ok {
			return id
		}
	}
	return ""
}

// mountNamespace is one of the container's processes.
type mountNamespace struct {
	process *Process // one in it
	mounts  []*mountinfo.Info
}

// mountNamespaces reads the mounts of each, whatever root its processes have.
func (c *Container) mountNamespaces() (out []mountNamespace, err error) {
	seen := make(map[string]bool)
	for _, p := range c.Processes {
		if p.mountNamespace == "" || seen[p.mountNamespace] {
			continue
		}
		mounts, err := namespaceMounts(p.PID)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the mounts of the namespace of process %d: %w", p.PID, err)
		}
		seen[p.mountNamespace] = true
		out = append(out, mountNamespace{p, mounts})
	}
	return out, nil
}

// lostProc finds mount namespaces without a file system of the type proc at /proc
// in which mounts are shared or slaves: CRIU reaches them by their names there
// (restore_one_sharing in criu/mount-v2.c).
func (c *Container) lostProc(spaces []mountNamespace) (findings []Finding) {
	const advice = "have it mount a proc file system there before the checkpoint"
	for _, n := range spaces {
		switch {
		case hasProc(n.mounts), !slices.ContainsFunc(n.mounts, propagates):
		case n.process.mountNamespace == c.Root.mountNamespace:
			findings = append(findings, Finding{Class: Refused, Code: errcode.NoProc, What: "has unmounted, moved or covered its /proc, which CRIU needs to restore mounts", Advice: advice})
		default:
			findings = append(findings, c.finding(n.process, rule{Refused, errcode.NoProc, "is in a mount namespace without a proc file system at /proc, which CRIU needs to restore its mounts", advice + ", or terminate it"}))
		}
	}
	return findings
}

// detached finds open files and directories on a mount that is in none of the
// container's mount namespaces any more, such as one that was unmounted lazily:
// CRIU has no place for them (dump_one_reg_file in criu/files-reg.c).
func (c *Container) detached(spaces []mountNamespace) (findings []Finding, err error) {
	ids := make(map[int]bool)
	for _, n := range spaces {
		for _, m := range n.mounts {
			ids[m.ID] = true
		}
	}
	queues := uint64(0)
	for _, p := range c.Processes {
		for _, f := range p.Files {
			if !strings.HasPrefix(f.Name, "/") || ids[f.MountID] || c.mounts.ids[f.MountID] != nil || slices.ContainsFunc(unnamed, func(n string) bool { return strings.HasPrefix(f.Name, n) }) {
				continue
			}
			st, err := lookAt(p, f)
			if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFDIR {
				continue // closed meanwhile, or a device, of which the mount does not matter
			}
			if queues == 0 {
				if _, _, queues, err = ipcObjects(c.Root.PID); err != nil {
					return nil, fmt.Errorf("inspect the IPC namespace: %w", err)
				}
			}
			if unix.Mkdev(st.Dev_major, st.Dev_minor) != queues {
				findings = append(findings, c.finding(p, rule{Refused, errcode.FileUnmounted, "has the file " + f.Name + " open, whose mount was unmounted", "close it before the checkpoint"}))
			}
		}
	}
	return findings, nil
}

// hidden are the mounts of a mount namespace that no name leads to, because
// another mount covers them or the one that they are on.
func hidden(mounts []*mountinfo.Info) map[int]bool {
	byID := make(map[int]*mountinfo.Info, len(mounts))
	below := make(map[int][]*mountinfo.Info)
	for _, m := range mounts {
		byID[m.ID] = m
		if m.Parent != m.ID {
			below[m.Parent] = append(below[m.Parent], m)
		}
	}
	out := make(map[int]bool)
	for _, m := range mounts {
		// A mount at the same point is on this one. One at the same point or above,
		// on the mount that this one is on, was made later.
		if slices.ContainsFunc(below[m.ID], func(o *mountinfo.Info) bool { return o.Mountpoint == m.Mountpoint }) {
			out[m.ID] = true
			continue
		}
		for at := m; at != nil; at = byID[at.Parent] {
			if slices.ContainsFunc(below[at.Parent], func(o *mountinfo.Info) bool { return o.ID != at.ID && isBelow(at.Mountpoint, o.Mountpoint) }) {
				out[m.ID] = true
				break
			}
			if at.Parent == at.ID {
				break
			}
		}
	}
	return out
}

// underCovered finds files that processes use on mounts that others cover: CRIU
// opens files by their names (dump_one_reg_file in criu/files-reg.c). A working
// directory is one of them.
func (c *Container) underCovered(spaces []mountNamespace) (findings []Finding) {
	covered := make(map[int]bool)
	devices := make(map[string]bool)
	for _, n := range spaces {
		ids := hidden(n.mounts)
		maps.Copy(covered, ids)
		for _, m := range n.mounts {
			if ids[m.ID] {
				devices[device(m)] = true
			}
		}
	}
	if len(covered) == 0 {
		return nil
	}
	const advice = "unmount what covers it before the checkpoint, or terminate the process"
	for _, p := range c.Processes {
		refuse := func(what string) {
			findings = append(findings, c.finding(p, rule{Refused, errcode.FileCovered, what + " on a mount that another one covers, which CRIU cannot checkpoint", advice}))
		}
		for _, f := range p.Files {
			if covered[f.MountID] && strings.HasPrefix(f.Name, "/") {
				refuse("has the file " + f.Name + " open")
			}
		}
		for _, m := range p.Mappings {
			if devices[m.Device] && covered[mountOfLink(p, "map_files/"+m.Addresses)] {
				refuse("has the file " + m.Path + " mapped")
			}
		}
		if covered[mountOfLink(p, "cwd")] {
			refuse("has its working directory")
		}
		if p.rootDir != "/" && covered[mountOfLink(p, "root")] {
			refuse("has its root directory")
		}
	}
	return findings
}

// mountOfLink is the id of the mount that a link of a process in /proc leads to,
// or 0.
func mountOfLink(p *Process, link string) int {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/%s", p.PID, link), unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return 0 // exited or unmapped meanwhile
	}
	return int(st.Mnt_id) //nolint:gosec // the kernel's are of 32 bits
}

// unnamed begin the names of what is on a mount of the kernel's own: memory above
// all.
var unnamed = []string{"/memfd:", "/SYSV", "/dev/zero" + deletedSuffix, "/anon_hugepage", "/secretmem", "/dmabuf:", "/[", "/drm", "/i915"}

// propagates reports whether a mount is shared or a slave.
func propagates(m *mountinfo.Info) bool {
	return strings.Contains(m.Optional, "shared:") || strings.Contains(m.Optional, "master:")
}

// hasProc reports whether /proc leads to a proc file system.
func hasProc(mounts []*mountinfo.Info) bool {
	ids := make(map[int]bool)
	for _, m := range mounts {
		ids[m.ID] = true
	}
	i := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return !ids[m.Parent] || m.Parent == m.ID })
	if i < 0 {
		return false
	}
	at := mounts[i]
	for _, point := range []string{"/", "/proc"} {
		for {
			i := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool {
				return m.Parent == at.ID && m.ID != at.ID && m.Mountpoint == point
			})
			if i < 0 {
				break
			}
			at = mounts[i]
		}
	}
	return at.FSType == "proc" && at.Root == "/" && at.Mountpoint == "/proc"
}

// namespaceMounts reads the mounts of a process's mount namespace, whatever root
// the process has.
func namespaceMounts(pid int) (mounts []*mountinfo.Info, err error) {
	err = thread.Do(func() error {
		proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/proc", Err: err}
		}
		defer unix.Close(proc)
		if err := thread.Enter(pid, "mnt"); err != nil {
			return err
		}
		// The kernel lists the mounts below the root of the thread that opens it.
		fd, err := unix.Openat(proc, "thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "mountinfo", Err: err}
		}
		f := os.NewFile(uintptr(fd), "mountinfo")
		defer f.Close()
		mounts, err = mountinfo.GetMountsFromReader(f, nil)
		return err
	})
	return mounts, err
}

// MountedDevice returns the device number of the file system that is mounted at
// a path, the upper one of two, or 0.
func MountedDevice(mounts []*mountinfo.Info, path string) (device uint64) {
	for _, m := range mounts {
		if m.Mountpoint == path {
			device = number(m)
		}
	}
	return device
}

// CheckShm finds out whether the container's own programs have covered or
// unmounted the /dev/shm that it was created with, by its device number: its
// files would not be found.
func (c *Container) CheckShm(device uint64) ([]Finding, error) {
	if device == 0 {
		return nil, nil
	}
	tree, err := c.Tree()
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	fd, err := tree.OpenMount(ShmDir, device)
	if err != nil {
		return []Finding{{Class: Refused, Code: errcode.SharedMemoryMoved, What: fmt.Sprintf("has covered, moved or unmounted its /dev/shm (%v)", errors.Unwrap(err)),
			Advice: "have it leave /dev/shm as the container was created with it"}}, nil
	}
	unix.Close(fd)
	return nil, nil
}

func madeMounts(mounts, given []*mountinfo.Info) (findings []Finding) {
	for _, m := range mounts {
		if bindsTerminal(m, given) {
			findings = append(findings, Finding{Class: Refused, Code: errcode.MountedTerminal,
				What:   fmt.Sprintf("has mounted the terminal /dev/pts%s at %s, which CRIU cannot restore", m.Root, m.Mountpoint),
				Advice: "unmount it before the checkpoint"})
			continue
		}
		// A bind of a part of another mount comes with that one.
		bind := slices.ContainsFunc(given, func(g *mountinfo.Info) bool { return number(g) == number(m) && isBelow(m.Root, g.Root) })
		if bind || slices.Contains(restorableFS, m.FSType) {
			continue
		}
		if inside.KindOf(m) == inside.Host {
			findings = append(findings, Finding{Class: Refused, Code: errcode.VolumeMoved,
				What:   fmt.Sprintf("has mounted or moved a volume to %s, and it is no longer mounted where the container was created with it, where CRIU looks for it", m.Mountpoint),
				Advice: "move it back or unmount it before the checkpoint"})
			continue
		}
		findings = append(findings, Finding{Class: Refused, Code: errcode.MountedType,
			What:   fmt.Sprintf("has mounted a file system of the type %s at %s, which CRIU cannot checkpoint", m.FSType, m.Mountpoint),
			Advice: "unmount it before the checkpoint, or create the container with it as a volume"})
	}
	return findings
}

// isBelow reports whether a path is a directory or in it.
func isBelow(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// bindsTerminal reports whether a mount shows a single terminal of a devpts other
// than the container's own terminal. CRIU creates the terminal when it mounts it,
// before the mounts of the container are complete (devpts_restore in criu/tty.c):
// its master is then open on a mount that is not the container's.
func bindsTerminal(m *mountinfo.Info, given []*mountinfo.Info) bool {
	if m.FSType != "devpts" {
		return false
	}
	if _, err := strconv.Atoi(strings.TrimPrefix(m.Root, "/")); err != nil {
		return false // all of it, or ptmx
	}
	return !slices.ContainsFunc(given, func(g *mountinfo.Info) bool {
		return g.Major == m.Major && g.Minor == m.Minor && g.Root == m.Root
	})
}

// PartialMounts are the external mounts of a container that show a part of a
// file system only, as binds of single files do, several of one share. They
// are made private before the container starts: when mounts have one master,
// CRIU copies the sharing of one of them to all (criu/mount-v2.c), which the
// kernel refuses unless that one shows all that the others do. Nothing is lost
// by it: what is mounted on the host reaches a guest through virtiofs, not by
// propagation in the guest.
func PartialMounts(pid int) ([]string, error) {
	container, err := Mounts(pid)
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the container: %w", err)
	}
	guest, err := Mounts(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the guest: %w", err)
	}
	return partial(container, Externals(container, guest, nil)), nil
}

func partial(container []*mountinfo.Info, external []*api.External) []string {
	var out []string
	for _, e := range external {
		if e.GetDevice() {
			continue // they all show the same node
		}
		for _, m := range container {
			if m.Mountpoint == e.GetDestination() && m.Root != "/" {
				out = append(out, m.Mountpoint)
			}
		}
	}
	return out
}

// Externals returns the mounts of a container that cannot be in an image set:
// those of file systems that CRIU does not support (virtiofs above all), those
// whose superblock belongs to the guest and not to the container (the sandbox's
// /dev/shm, tmpfs volumes, masks bound from the guest's /dev), and the
// container's cgroup: CRIU would mount that of the restored processes, a child
// without limits, while Go's runtime, for one, keeps cpu.max open. Marked
// destinations are external as well. The root mount never is.
func Externals(container, guest []*mountinfo.Info, marked []string) []*api.External {
	shared := make(map[[2]int]bool, len(guest))
	for _, m := range guest {
		shared[[2]int{m.Major, m.Minor}] = true
	}
	var out []*api.External
	for _, m := range container {
		if m.Mountpoint == "/" {
			continue
		}
		device := m.FSType == "devtmpfs"
		external := m.Mountpoint == "/dev/shm" || slices.Contains(marked, m.Mountpoint)
		switch {
		case slices.Contains(kernelFS, m.FSType):
		case m.FSType == "tmpfs", device:
			external = external || shared[[2]int{m.Major, m.Minor}]
		default:
			external = true
		}
		if !external {
			continue
		}
		// A mount that is covered by another one is not visible, and CRIU's key
		// is the path: the last mount counts.
		out = slices.DeleteFunc(out, func(e *api.External) bool { return e.Destination == m.Mountpoint })
		out = append(out, &api.External{Destination: m.Mountpoint, Fstype: m.FSType, Device: device})
	}
	for i, e := range out {
		// Not the path, which may contain characters that CRIU parses.
		e.Name = imageset.ExternalName(i)
	}
	return out
}

// FileMounts are the mount points of a container that are not directories, such
// as a single file of a volume. CRIU finds the path of a watched file (inotify,
// fanotify) through a directory of its file system, of which the container may
// have none.
func (c *Container) FileMounts(ctx context.Context) ([]string, error) {
	tree, err := c.Tree()
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	var out []string
	for _, m := range c.mounts.root {
		if err := ended(ctx); err != nil {
			return nil, err
		}
		if inside.KindOf(m) == inside.Memory || !c.mounts.answers(m) {
			continue
		}
		fd, err := tree.Open(m.Mountpoint, unix.O_PATH|unix.O_NOFOLLOW)
		if err != nil {
			continue // covered by another mount, or gone
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
		if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			out = append(out, m.Mountpoint)
		}
	}
	return out, nil
}

// imageDevices are the devices of the file systems that the image set contains:
// those of [InImages].
func (c *Container) imageDevices(marked []string) (map[uint64]bool, error) {
	external, err := c.externals(marked)
	if err != nil {
		return nil, err
	}
	out := make(map[uint64]bool)
	for _, m := range c.mounts.root {
		in := m.FSType == "tmpfs" && m.Mountpoint != "/" &&
			!slices.ContainsFunc(external, func(e *api.External) bool { return e.GetDestination() == m.Mountpoint })
		if known, seen := out[number(m)]; !seen || known {
			out[number(m)] = in
		}
	}
	return out, nil
}

// InImages reports whether a path of a container is in a file system that CRIU's
// images contain: a tmpfs that is not external.
func InImages(path string, mounts []*mountinfo.Info, external []*api.External) bool {
	var on *mountinfo.Info
	for _, m := range mounts {
		below := m.Mountpoint == "/" || path == m.Mountpoint || strings.HasPrefix(path, m.Mountpoint+"/")
		if below && (on == nil || len(m.Mountpoint) >= len(on.Mountpoint)) {
			on = m // the last one covers those before
		}
	}
	return on != nil && on.FSType == "tmpfs" && on.Mountpoint != "/" &&
		!slices.ContainsFunc(external, func(e *api.External) bool { return e.GetDestination() == on.Mountpoint })
}
