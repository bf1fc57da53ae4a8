// SPDX-License-Identifier: Apache-2.0

// Package outcome checks restored processes before they run: whatever an image
// set made CRIU do, they have nothing that a process of their container could
// not have.
//
// It looks at the processes themselves, in /proc, and not at CRIU's images, of
// which an attacker may have made CRIU read others than expected. What a
// container may have is taken from its placeholder, which Kata has created by
// the container's specification, and from the rights in the specification that
// the placeholder does not have itself. A process may have less, and what it
// could have acquired: other users by CAP_SETUID or a set-user-ID program, mounts
// by CAP_SYS_ADMIN.
//
// The agent calls it while the processes are frozen and before they have executed
// an instruction. It touches no file that they have open, whose server may be one
// of them. It relies on Linux 6.18 and on what CRIU 4.2 restores.
package outcome

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Container is what the processes of a container may have.
type Container struct {
	pid         int // of the placeholder
	rights      rights
	placeholder credentials
	oomScore    int
	limits      []uint64 // hard ones, by resource
	label       string   // of the LSM; empty: none
	namespaces  map[string]string
	guest       map[string]string // the agent's own namespaces
	mounts      *table
	// guestDevices are those of the file systems in the agent's mount namespace.
	guestDevices map[[2]int]bool
	// devices are those that it has nodes of.
	devices map[deviceNode]bool
	stdio   []file
	// memory are the mounts in the kernel that unnamed memory is on.
	memory map[uint64]bool
	// running: its processes run, and may exit meanwhile.
	running bool
}

// Read returns what the processes of a container may have, given its placeholder
// and the rights in its specification. Without those, as from an older shim, they
// are the placeholder's.
func Read(placeholder int, r *api.Rights) (*Container, error) {
	c := &Container{pid: placeholder}
	if err := c.read(placeholder, r); err != nil {
		return nil, fmt.Errorf("read what the processes of the container may have: %w", err)
	}
	return c, nil
}

func (c *Container) read(placeholder int, r *api.Rights) (err error) {
	if c.placeholder, err = readCredentials(placeholder, placeholder); err != nil {
		return err
	}
	c.placeholder.noNewPrivs = c.placeholder.noNewPrivs && !r.GetExecs()
	c.rights = newRights(r, &c.placeholder)
	if c.oomScore, err = oomScore(placeholder); err != nil {
		return err
	}
	if c.limits, err = hardLimits(placeholder); err != nil {
		return err
	}
	if r.GetExecs() {
		c.oomScore = math.MinInt
		if err := c.addLimits(); err != nil {
			return err
		}
	}
	c.label = label(placeholder)
	if c.namespaces, err = namespaces(placeholder); err != nil {
		return err
	}
	if c.guest, err = namespaces(os.Getpid()); err != nil {
		return err
	}
	if c.mounts, err = readMounts(placeholder); err != nil {
		return err
	}
	guest, err := readMounts(os.Getpid())
	if err != nil {
		return err
	}
	c.guestDevices = guest.devices()
	if c.devices, err = (&comparison{may: c.mounts, guest: c.guestDevices}).readDevices(placeholder); err != nil {
		return err
	}
	if c.memory, err = unnamedMemory(); err != nil {
		return err
	}
	for fd := range 3 {
		if f, err := look(fmt.Sprintf("/proc/%d/fd/%d", placeholder, fd)); err == nil {
			c.stdio = append(c.stdio, f)
		}
	}
	return nil
}

// Excess is something that a process has and its container does not.
type Excess struct {
	PID  int    // in the guest's root PID namespace
	What string // completes "the process X ..."
}

// Excesses returns what processes of a running container have in excess of the
// rights in its specification, so that [Container.Check] would refuse them after a
// restore. A privileged exec leaves such processes. Init is the container's, and
// processes are by their PIDs in the guest's root PID namespace.
func Excesses(init int, processes []int, r *api.Rights) ([]Excess, error) {
	c, err := specified(init, r)
	if err != nil {
		return nil, fmt.Errorf("read what the processes of the container may have: %w", err)
	}
	k := &check{Container: c, processes: processes}
	for _, pid := range processes {
		alive, err := k.threads(pid)
		if err == nil && alive {
			err = k.resources(pid)
		}
		if err != nil && !k.exited(err) {
			return nil, fmt.Errorf("read what process %d has: %w", pid, err)
		}
	}
	return k.excesses, nil
}

// specified returns what the processes of a running container may have. What the
// specification leaves open is as the agent has it, which Kata's agent has started
// like the container; only its oom_score_adj is its own.
func specified(init int, r *api.Rights) (_ *Container, err error) {
	agent := os.Getpid()
	c := &Container{pid: agent, running: true, oomScore: math.MinInt}
	if c.placeholder, err = readCredentials(agent, agent); err != nil {
		return nil, err
	}
	c.placeholder.noNewPrivs, c.placeholder.seccomp, c.placeholder.filters = r.GetNoNewPrivs() && !r.GetExecs(), 0, 0
	c.rights = newRights(r, &c.placeholder)
	if c.limits, err = hardLimits(agent); err != nil {
		return nil, err
	}
	for resource, name := range limitNames {
		if most, ok := r.GetLimits()["RLIMIT_"+name]; ok {
			c.limits[resource] = most
		}
	}
	if r.GetExecs() {
		if err := c.addLimits(); err != nil {
			return nil, err
		}
	}
	c.mounts, err = readMounts(init)
	return c, err
}

// exited reports whether an error says that a process of a running container has
// exited.
func (c *Container) exited(err error) bool {
	return c.running && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH))
}

// Check returns an error that names each restored process with something that it
// may not have. Processes are all of them, by their PIDs in the guest's root PID
// namespace, and the caller has frozen them.
func (c *Container) Check(processes []int) error {
	k := &check{Container: c, processes: processes}
	if err := k.run(); err != nil {
		return fmt.Errorf("check the restored processes: %w", err)
	}
	if len(k.excesses) == 0 {
		return nil
	}
	return errcode.TooManyRights.Errorf("the image set gives its processes more than this container may have, and none of them has run: %s", strings.Join(k.findings(), "; "))
}

// maxExcesses bounds how many of them are named.
const maxExcesses = 10

// check is one run of [Container.Check].
type check struct {
	*Container
	processes []int
	excesses  []Excess

	programs *programs // once needed
	mountIDs map[uint64]bool
	// spaces are the mount and other namespaces of the restored processes.
	spaces map[string]bool
	seen   map[mapped]bool
	known  map[uint64]bool
}

func (k *check) find(pid int, format string, args ...any) {
	e := Excess{pid, fmt.Sprintf(format, args...)}
	if len(k.excesses) < maxExcesses && !slices.Contains(k.excesses, e) {
		k.excesses = append(k.excesses, e)
	}
}

func (k *check) findings() []string {
	out := make([]string, 0, len(k.excesses))
	for _, e := range k.excesses {
		out = append(out, fmt.Sprintf("process %s (PID %d) %s", inspect.Name(e.PID), innerPID(e.PID), e.What))
	}
	return out
}

func innerPID(pid int) int {
	if pids, err := procfs.NSPIDs(pid); err == nil {
		return pids[len(pids)-1]
	}
	return pid
}

func (k *check) run() error {
	if len(k.processes) == 0 {
		return errors.New("there are none")
	}
	alive := make([]int, 0, len(k.processes))
	for _, pid := range k.processes {
		ok, err := k.threads(pid)
		if err != nil {
			return err
		}
		if ok {
			alive = append(alive, pid)
		}
	}
	for _, pid := range alive {
		if err := k.resources(pid); err != nil {
			return err
		}
	}
	// What files are looked at for depends on the namespaces of all.
	if err := k.checkNamespaces(alive); err != nil {
		return err
	}
	for _, pid := range alive {
		if err := k.files(pid); err != nil {
			return err
		}
	}
	return nil
}

// threads checks each thread of a process. It reports whether one is alive:
// one that has exited has nothing any more.
func (k *check) threads(pid int) (alive bool, err error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		var tid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &tid); err != nil {
			return false, err
		}
		t, err := readCredentials(pid, tid)
		if k.exited(err) {
			continue
		}
		if err != nil {
			return false, err
		}
		if t.exited {
			continue
		}
		alive = true
		if err := k.thread(pid, &t); err != nil {
			return false, err
		}
		if err := k.scheduling(pid, tid); err != nil && !k.exited(err) {
			return false, err
		}
	}
	return alive, nil
}

func namespaces(pid int) (map[string]string, error) {
	out := make(map[string]string)
	for _, kind := range []string{"mnt", "net", "ipc", "uts", "user", "cgroup", "pid"} {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if errors.Is(err, fs.ErrNotExist) && kind != "mnt" {
			continue // the kernel lacks the kind
		}
		if err != nil {
			return nil, err
		}
		out[kind] = link
	}
	return out, nil
}

// checkNamespaces checks the namespaces of the processes, and the mounts in each
// mount namespace.
func (k *check) checkNamespaces(processes []int) error {
	k.spaces, k.mountIDs = make(map[string]bool), make(map[uint64]bool)
	for _, link := range k.namespaces {
		k.spaces[link] = true
	}
	delete(k.spaces, k.namespaces["mnt"])
	delete(k.spaces, k.namespaces["pid"])
	delete(k.spaces, k.namespaces["cgroup"])
	for _, pid := range processes {
		have, err := namespaces(pid)
		if err != nil {
			return err
		}
		for _, kind := range []string{"net", "uts", "user"} {
			if have[kind] != k.namespaces[kind] {
				k.find(pid, "is in another %s namespace than the container", kind)
			}
		}
		// One of its own has what it had: System V objects, and its own view of
		// the cgroups.
		if have["ipc"] != k.namespaces["ipc"] && have["ipc"] == k.guest["ipc"] {
			k.find(pid, "is in the guest's own ipc namespace")
		}
		if have["cgroup"] == k.guest["cgroup"] {
			k.find(pid, "is in the guest's own cgroup namespace")
		}
		if err := k.pidNamespace(pid, have["pid"]); err != nil {
			return err
		}
		for kind, link := range have {
			if !k.spaces[link] && kind == "mnt" {
				if err := k.mountNamespace(pid, link); err != nil {
					return err
				}
			}
			k.spaces[link] = true
		}
	}
	return nil
}

// pidNamespace checks that a process is in a PID namespace right below the
// placeholder's.
func (k *check) pidNamespace(pid int, link string) error {
	if k.spaces[link] {
		return nil
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/pid", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	parent, err := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
	if errors.Is(err, unix.EPERM) {
		k.find(pid, "is in the guest's own pid namespace")
		return nil
	}
	if err != nil {
		return fmt.Errorf("parent of the PID namespace of process %d: %w", pid, err)
	}
	defer unix.Close(parent)
	if name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", parent)); err != nil {
		return err
	} else if name != k.namespaces["pid"] {
		k.find(pid, "is in a pid namespace that is not the container's")
	}
	return nil
}
