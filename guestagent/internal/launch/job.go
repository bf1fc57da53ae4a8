// SPDX-License-Identifier: Apache-2.0

package launch

import "errors"

// Names in an operation's directory.
const (
	// JobName is the file of the job.
	JobName = "job.json"
	// ErrorName is the file with the launcher's error: its stderr is not read.
	ErrorName = "launch-error"
)

// ServiceFD is CRIU's end of the socket. The next descriptor is a copy of the
// agent's. It keeps the socket open if the agent dies: CRIU then waits forever for
// the answer to a notification. At the end of the socket it would let processes run
// that nobody has looked at, since it ignores a failure of the stage pre-resume
// (criu/cr-restore.c, restore_root_task).
const ServiceFD = 3

// ErrPIDTaken is the launcher's error if it has a PID that CRIU must not have.
var ErrPIDTaken = errors.New("no PID is left for CRIU")

// Job tells the launcher what to do before it executes CRIU. PIDs are those of
// the guest's root PID namespace.
type Job struct {
	// Program is CRIU, and Env its environment.
	Program string   `json:"program"`
	Env     []string `json:"env"`
	// Target is the process whose namespaces are joined.
	Target int `json:"target"`
	// TargetInside is Target's PID in its own PID namespace.
	TargetInside int `json:"targetInside"`
	// Join are the kinds of namespaces of Target that CRIU runs in, besides its
	// PID namespace: ipc, uts, cgroup.
	Join []string `json:"join"`
	// FreshProc reports that CRIU runs in a PID namespace other than the
	// guest's root one and needs a /proc of it.
	FreshProc bool `json:"freshProc"`
	// Avoid are PIDs that CRIU must not have in its PID namespace: it mistakes
	// a process with its own PID in another namespace for itself (get_proc_fd
	// in criu/util.c) and then sets the clocks of its own time namespace.
	Avoid []int `json:"avoid,omitempty"`
	// Cgroup is the directory of a cgroup that CRIU starts in and that becomes the
	// root of its cgroup namespace; or empty.
	Cgroup string `json:"cgroup,omitempty"`
	// Mounts are clones of mounts of Target, each with its own mount point.
	Mounts []MountClone `json:"mounts,omitempty"`
	// Inherit are descriptors of Target that CRIU gets, their numbers increased
	// by InheritBase.
	Inherit []int `json:"inherit,omitempty"`
	// CgroupNamespaces are processes that CRIU takes for ones in Target's cgroup
	// namespace.
	CgroupNamespaces []int `json:"cgroupNamespaces,omitempty"`
	// Sockets are TCP connections that the processes continue to use if CRIU is
	// killed in a dump.
	Sockets []Socket `json:"sockets,omitempty"`
	// PIDNamespaceOf is a process whose PID namespace CRIU gets as the
	// descriptor [PIDNamespaceFD]; or 0.
	PIDNamespaceOf int `json:"pidNamespaceOf,omitempty"`
}

// MountClone attaches a clone of the mount at Path in the target's mount
// namespace at At in CRIU's.
type MountClone struct {
	Path string `json:"path"`
	At   string `json:"at"`
	// Null: if the target has no such mount, the guest's /dev/null is used.
	Null bool `json:"null,omitempty"`
}

// InheritBase keeps inherited descriptors clear of CRIU's own.
const InheritBase = 100

// PIDNamespaceFD is clear of the target's stdio.
const PIDNamespaceFD = InheritBase + 10

// Socket is a TCP connection of a process that is dumped.
type Socket struct {
	PID int `json:"pid"`
	FD  int `json:"fd"`
}
