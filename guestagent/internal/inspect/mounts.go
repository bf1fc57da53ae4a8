// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bytes"
	"context"
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
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
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

// Given returns the mounts at mount points that a container was created with.
// The others were made by its own programs.
func Given(mounts []*mountinfo.Info, points []string) []*mountinfo.Info {
	if points == nil {
		return mounts
	}
	seen := make(map[string]bool)
	var out []*mountinfo.Info
	for _, m := range mounts {
		// A second mount at the same point covers the first.
		if slices.Contains(points, m.Mountpoint) && !seen[m.Mountpoint] {
			out = append(out, m)
		}
		seen[m.Mountpoint] = true
	}
	return out
}

// CheckMounts finds mounts that a container's own programs have made, in any
// mount namespace of theirs, of file systems that CRIU cannot restore.
func (c *Container) CheckMounts() (findings []Finding) {
	for _, m := range Given(c.mounts.root, c.points) {
		if text.Line(m.Mountpoint, unix.PathMax) != m.Mountpoint {
			findings = append(findings, Finding{Class: Refused,
				What:   fmt.Sprintf("has a mount at %s, a name with characters that cannot be printed", shown(m.Mountpoint)),
				Advice: "create it with the mount at another path"})
		}
	}
	if c.points == nil {
		return findings
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
	return distinct(append(findings, madeMounts(nested, given)...))
}

// MountedDevice returns the device number of the file system that is mounted at
// a path, the upper one of two, or 0.
func MountedDevice(mounts []*mountinfo.Info, path string) (device uint64) {
	for _, m := range mounts {
		if m.Mountpoint == path {
			device = unix.Mkdev(uint32(m.Major), uint32(m.Minor)) //nolint:gosec // device numbers
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
		return []Finding{{Class: Refused, What: fmt.Sprintf("has covered, moved or unmounted its /dev/shm (%v)", errors.Unwrap(err)),
			Advice: "have it leave /dev/shm as the container was created with it"}}, nil
	}
	unix.Close(fd)
	return nil, nil
}

func madeMounts(mounts, given []*mountinfo.Info) (findings []Finding) {
	for _, m := range mounts {
		if bindsTerminal(m, given) {
			findings = append(findings, Finding{Class: Refused,
				What:   fmt.Sprintf("has mounted the terminal /dev/pts%s at %s, which CRIU cannot restore", m.Root, m.Mountpoint),
				Advice: "unmount it before the checkpoint"})
			continue
		}
		// A bind of a part of another mount comes with that one.
		bind := slices.ContainsFunc(given, func(g *mountinfo.Info) bool { return g.Major == m.Major && g.Minor == m.Minor })
		if bind || slices.Contains(restorableFS, m.FSType) {
			continue
		}
		findings = append(findings, Finding{Class: Refused,
			What:   fmt.Sprintf("has mounted a file system of the type %s at %s, which CRIU cannot checkpoint", m.FSType, m.Mountpoint),
			Advice: "unmount it before the checkpoint, or create the container with it as a volume"})
	}
	return findings
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
