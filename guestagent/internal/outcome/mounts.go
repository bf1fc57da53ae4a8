// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// kernelKinds are file systems that show the state of the kernel: CRIU mounts
// them again, and what one of them shows is decided by the namespaces.
var kernelKinds = []string{"proc", "sysfs", "mqueue", "devpts", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "pstore", "binfmt_misc", "fusectl", "configfs"}

// table is what is mounted in a mount namespace.
type table struct {
	mounts   []*mountinfo.Info
	children map[int]map[string]*mountinfo.Info // by the parent's ID and mount point
	root     *mountinfo.Info
}

// readMounts reads the mounts of the namespace of a process. They are all that
// can be reached from the namespace's root, whatever root the process has.
func readMounts(pid int) (*table, error) {
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc: %w", err)
	}
	defer unix.Close(proc)
	var t *table
	err = thread.Do(func() error {
		if err := thread.Enter(pid, "mnt"); err != nil {
			return err
		}
		fd, err := unix.Openat(proc, "thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open mountinfo: %w", err)
		}
		defer unix.Close(fd)
		t, err = parseMounts(reader(fd))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the mounts of process %d: %w", pid, err)
	}
	return t, nil
}

// reader reads a descriptor.
type reader int

func (r reader) Read(p []byte) (int, error) {
	n, err := unix.Read(int(r), p)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func parseMounts(r io.Reader) (*table, error) {
	mounts, err := mountinfo.GetMountsFromReader(r, nil)
	if err != nil {
		return nil, err
	}
	t := &table{mounts: mounts, children: make(map[int]map[string]*mountinfo.Info)}
	ids := make(map[int]bool)
	for _, m := range mounts {
		ids[m.ID] = true
	}
	for _, m := range mounts {
		if !ids[m.Parent] || m.Parent == m.ID {
			if t.root != nil {
				return nil, fmt.Errorf("the mounts %d and %d both have no parent", t.root.ID, m.ID)
			}
			t.root = m
			continue
		}
		if t.children[m.Parent] == nil {
			t.children[m.Parent] = make(map[string]*mountinfo.Info)
		}
		t.children[m.Parent][m.Mountpoint] = m
	}
	if t.root == nil {
		return nil, fmt.Errorf("%d mounts without a root", len(mounts))
	}
	return t, nil
}

// at returns the mount that a path leads to.
func (t *table) at(name string) *mountinfo.Info {
	m := t.root
	enter := func(point string) {
		for {
			next := t.children[m.ID][point]
			if next == nil {
				return
			}
			m = next
		}
	}
	enter("/")
	for i := 1; i < len(name); i++ {
		if name[i] == '/' {
			enter(name[:i])
		}
	}
	enter(name)
	return m
}

// count returns how many mounts there are at a mount point.
func (t *table) count(point string) (n int) {
	for _, m := range t.mounts {
		if m.Mountpoint == point {
			n++
		}
	}
	return n
}

// shown is the path, in the file system of a mount, of what the mount shows at a
// path.
func shown(m *mountinfo.Info, name string) string {
	return path.Join(m.Root, strings.TrimPrefix(name, m.Mountpoint))
}

func sameDevice(a, b *mountinfo.Info) bool { return a.Major == b.Major && a.Minor == b.Minor }

// isBelow reports whether a path is a directory or in it.
func isBelow(name, dir string) bool {
	return name == dir || dir == "/" || strings.HasPrefix(name, dir+"/")
}

// restricting are the options of a mount that take something away.
var restricting = []string{"ro", "nosuid", "nodev", "noexec", "nosymfollow"}

func restrictions(m *mountinfo.Info) (out []string) {
	for option := range strings.SplitSeq(m.Options, ",") {
		if slices.Contains(restricting, option) {
			out = append(out, option)
		}
	}
	for option := range strings.SplitSeq(m.VFSOptions, ",") {
		if option == "ro" && !slices.Contains(out, "ro") || m.FSType == "proc" && (strings.HasPrefix(option, "hidepid=") || strings.HasPrefix(option, "subset=")) {
			out = append(out, option)
		}
	}
	return out
}

// lacks returns the restrictions of one mount that another one lacks.
func lacks(m, of *mountinfo.Info) (out []string) {
	have := restrictions(m)
	for _, r := range restrictions(of) {
		if !slices.Contains(have, r) {
			out = append(out, r)
		}
	}
	return out
}

// devices are those of the file systems that are mounted.
func (t *table) devices() map[[2]int]bool {
	out := make(map[[2]int]bool)
	for _, m := range t.mounts {
		out[[2]int{m.Major, m.Minor}] = true
	}
	return out
}

// comparison is of the mounts of restored processes with those of their
// placeholder.
type comparison struct {
	have, may *table
	// guest are the devices of the file systems in the guest's own namespace.
	guest map[[2]int]bool
	// canMount: the container can mount, and may have mounted again what is in its
	// namespace, and what only shows the kernel's state.
	canMount bool
}

// fresh reports whether a mount is of a tmpfs that CRIU has created, and has
// filled from the images, rather than one of the guest's.
func (c *comparison) fresh(m *mountinfo.Info) bool {
	return m.FSType == "tmpfs" && !c.guest[[2]int{m.Major, m.Minor}]
}

// masks reports whether a mount hides what is below it and shows nothing: it is
// /dev/null, the guest's or the container's, or a directory that cannot be written
// to. What is in that came with the image set, and a process could have written it
// to any other file.
func (c *comparison) masks(m *mountinfo.Info) bool {
	return m.Root == "/null" && (m.FSType == "devtmpfs" || c.fresh(m)) || c.fresh(m) && slices.Contains(restrictions(m), "ro")
}

// hides reports whether a mount of the placeholder's hides something: whatever is
// mounted over the state of the kernel does.
func (c *comparison) hides(g *mountinfo.Info) bool {
	if c.masks(g) {
		return true
	}
	i := slices.IndexFunc(c.may.mounts, func(m *mountinfo.Info) bool { return m.ID == g.Parent })
	return i >= 0 && slices.Contains(kernelKinds, c.may.mounts[i].FSType) && !slices.Contains(kernelKinds, g.FSType)
}

// mountNamespace checks the mounts in the namespace of a process.
func (k *check) mountNamespace(pid int, link string) error {
	switch link {
	case k.guest["mnt"]:
		k.find(pid, "is in the guest's own mnt namespace")
		return nil
	case k.namespaces["mnt"]:
		k.find(pid, "is in the mnt namespace of its placeholder")
		return nil
	}
	t, err := readMounts(pid)
	if err != nil {
		return err
	}
	canMount, err := k.able(capability.CAP_SYS_ADMIN)
	if err != nil {
		return err
	}
	c := comparison{have: t, may: k.mounts, guest: k.guestDevices, canMount: canMount}
	for _, problem := range c.problems() {
		k.find(pid, "%s", problem)
	}
	if err := k.contents(pid, &c); err != nil {
		return err
	}
	for _, m := range t.mounts {
		k.mountIDs[uint64(m.ID)] = true //nolint:gosec // not negative
	}
	return nil
}

// problems returns what is wrong with the mounts.
func (c *comparison) problems() (out []string) {
	for _, m := range c.have.mounts {
		if problem := c.judge(m); problem != "" {
			out = append(out, problem)
		}
	}
	if c.canMount {
		return out
	}
	for _, g := range c.may.mounts {
		if problem := c.missing(g); problem != "" {
			out = append(out, problem)
		}
	}
	return out
}

// missing returns what is wrong if there is no mount at the mount point of one of
// the placeholder's; "" if nothing is.
func (c *comparison) missing(g *mountinfo.Info) string {
	m := c.have.at(g.Mountpoint)
	if m.Mountpoint == g.Mountpoint || isBelow(g.Mountpoint, api.HelperPath) || c.may.at(g.Mountpoint) != g {
		return ""
	}
	if c.hides(g) {
		return fmt.Sprintf("sees %s, which the container does not", g.Mountpoint)
	}
	// Of a read-only path there is what is below the mount.
	same := m.FSType == g.FSType && (slices.Contains(kernelKinds, m.FSType) || sameDevice(m, g)) && shown(m, g.Mountpoint) == g.Root
	if lost := lacks(m, g); same && len(lost) > 0 {
		return without(g.Mountpoint, lost)
	}
	return ""
}

func without(point string, lost []string) string {
	return fmt.Sprintf("has %s without %s, unlike the container", point, strings.Join(lost, ", "))
}

// judge returns what is wrong with a mount; "" if nothing is.
func (c *comparison) judge(m *mountinfo.Info) string {
	kernel := slices.Contains(kernelKinds, m.FSType)
	if c.masks(m) || kernel && c.canMount {
		return ""
	}
	if kernel || c.fresh(m) {
		return c.judgePlace(m)
	}
	// A part of what is mounted in the container, as much restricted.
	var lost []string
	for _, g := range c.may.mounts {
		if !sameDevice(m, g) || !isBelow(m.Root, g.Root) || isBelow(g.Mountpoint, api.HelperPath) {
			continue
		}
		if lost = lacks(m, g); len(lost) == 0 || c.canMount {
			return ""
		}
	}
	if len(lost) > 0 {
		return without(m.Mountpoint, lost)
	}
	if m.FSType == "devtmpfs" && c.canMount {
		return ""
	}
	return fmt.Sprintf("has the file system %s (%s) mounted at %s, which the container has not", m.Source, m.FSType, m.Mountpoint)
}

// judgePlace judges a file system that was mounted by CRIU: only where the
// container has one of its kind, and what that shows.
func (c *comparison) judgePlace(m *mountinfo.Info) string {
	if c.canMount {
		return ""
	}
	g := c.may.at(m.Mountpoint)
	if g.FSType != m.FSType {
		if c.fresh(m) {
			return newTmpfs(m)
		}
		return fmt.Sprintf("has a file system of the type %s mounted at %s, which the container has not", m.FSType, m.Mountpoint)
	}
	// A terminal has another number than in the placeholder.
	if shown(g, m.Mountpoint) != m.Root && m.FSType != "devpts" {
		return fmt.Sprintf("has %s of a file system of the type %s mounted at %s, and the container %s", m.Root, m.FSType, m.Mountpoint, shown(g, m.Mountpoint))
	}
	if lost := lacks(m, g); len(lost) > 0 {
		return without(m.Mountpoint, lost)
	}
	// Below another mount it would be reached by none of the names that are
	// masked.
	if c.have.at(m.Mountpoint) != m && c.have.count(m.Mountpoint) > c.may.count(m.Mountpoint) {
		return fmt.Sprintf("has a hidden file system of the type %s at %s", m.FSType, m.Mountpoint)
	}
	return ""
}

// newTmpfs judges a tmpfs where the container has none.
func newTmpfs(m *mountinfo.Info) string {
	for _, option := range []string{"nosuid", "nodev"} {
		if !slices.Contains(restrictions(m), option) {
			return fmt.Sprintf("has a tmpfs mounted at %s without %s, which the container has not", m.Mountpoint, option)
		}
	}
	return ""
}
