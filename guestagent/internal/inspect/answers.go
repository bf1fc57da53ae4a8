// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
)

// While a container is frozen, nobody may wait for a file that a process of the
// container serves itself (FUSE), and at no time for a server that may be gone
// (NFS): a call for such a file blocks in the kernel, where no context reaches
// it. So nothing here touches a file before its mount is known to answer. The
// kernel names the mount of a descriptor (fdinfo) and the device of a mapping
// (maps) without asking the file system.

// mountTable has the mounts in all mount namespaces of a container's processes.
type mountTable struct {
	// root are those that init sees.
	root []*mountinfo.Info
	ids  map[int]*mountinfo.Info
	// devices are by their numbers as /proc/PID/maps prints them.
	devices map[string]*mountinfo.Info
	// given are the devices of the mounts that the container was created with;
	// nil: all are.
	given map[[2]int]bool
}

func device(m *mountinfo.Info) string { return fmt.Sprintf("%02x:%02x", m.Major, m.Minor) }

// readMounts reads the mounts of a container's processes. Points are the mounts
// that the container was created with, nil if they are not known.
func readMounts(root *Process, processes []*Process, points []Point) (*mountTable, error) {
	t := &mountTable{ids: make(map[int]*mountinfo.Info), devices: make(map[string]*mountinfo.Info)}
	var err error
	if t.root, err = Mounts(root.PID); err != nil {
		return nil, fmt.Errorf("read the mounts of the container: %w", err)
	}
	if points != nil {
		t.given = make(map[[2]int]bool)
		for _, m := range Given(t.root, points) {
			t.given[[2]int{m.Major, m.Minor}] = true
		}
	}
	t.add(t.root)
	type view struct{ namespace, root string }
	seen := map[view]bool{{root.mountNamespace, root.rootDir}: true}
	for _, p := range processes {
		v := view{p.mountNamespace, p.rootDir}
		if p.mountNamespace == "" || seen[v] {
			continue
		}
		seen[v] = true
		list, err := Mounts(p.PID)
		if gone(err) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the mounts of process %d: %w", p.PID, err)
		}
		t.add(list)
	}
	return t, nil
}

func (t *mountTable) add(list []*mountinfo.Info) {
	for _, m := range list {
		t.ids[m.ID] = m
		t.devices[device(m)] = m
	}
}

// answers reports whether a mount is known to answer. One that is not known is
// not.
func (t *mountTable) answers(m *mountinfo.Info) bool {
	if m == nil {
		return false
	}
	switch inside.KindOf(m) {
	case inside.Memory, inside.Host:
		return true
	case inside.Disk: // a workload may have made it of a file on any file system
		return t.given == nil || t.given[[2]int{m.Major, m.Minor}]
	}
	return false
}

// Tree opens the container's files, those that are known to answer.
func (c *Container) Tree() (*inside.Tree, error) { return inside.Open(c.Root.PID, c.mounts.answers) }

// Tree opens the files that a process of a container sees, those that are known
// to answer. Points are the mounts that the container was created with.
func Tree(pid int, points []Point) (*inside.Tree, error) {
	p := &Process{PID: pid}
	mounts, err := readMounts(p, []*Process{p}, points)
	if err != nil {
		return nil, err
	}
	return inside.Open(pid, mounts.answers)
}

// mountOf is the mount of a descriptor, or nil.
func (t *mountTable) mountOf(f File) *mountinfo.Info {
	if t == nil {
		return nil
	}
	return t.ids[f.MountID]
}

// inInit reports whether a mount is one of those that init sees: only there do
// the names of files mean what they mean in the tree of the container.
func (t *mountTable) inInit(m *mountinfo.Info) bool {
	return slices.ContainsFunc(t.root, func(r *mountinfo.Info) bool { return r.ID == m.ID })
}

// inRoot is the mount that init has in place of a mount of another mount
// namespace, or nil.
func (t *mountTable) inRoot(m *mountinfo.Info) *mountinfo.Info {
	if m == nil {
		return nil
	}
	i := slices.IndexFunc(t.root, func(r *mountinfo.Info) bool {
		return r.Mountpoint == m.Mountpoint && r.Root == m.Root && r.Major == m.Major && r.Minor == m.Minor
	})
	if i < 0 {
		return nil
	}
	return t.root[i]
}

// deviceOf is a mount of a mapping's file system, or nil.
func (t *mountTable) deviceOf(m Mapping) *mountinfo.Info { return t.devices[m.Device] }

// mountOfFD is the mount of a descriptor of this process, or nil.
func (t *mountTable) mountOfFD(fd int) (*mountinfo.Info, error) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return nil, err
	}
	f := File{FD: fd}
	if err := f.parseInfo(info); err != nil {
		return nil, err
	}
	return t.mountOf(f), nil
}
