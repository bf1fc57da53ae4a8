package criu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	gocriu "github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Names in an operation's directory.
const (
	launcherName = "criu" // what go-criu starts: a link to the agent
	jobName      = "job.json"
	confName     = "criu.conf"
	logName      = "criu.log"
	statsName    = "stats-"
)

// Job is what the launcher does before it becomes CRIU. Processes are named by
// their pids in the guest's root pid namespace.
type Job struct {
	// Target is the process whose namespaces are joined.
	Target int `json:"target"`
	// TargetInside is Target's pid in its own pid namespace.
	TargetInside int `json:"targetInside"`
	// Join are the kinds of namespaces of Target that CRIU works in, besides
	// its pid namespace: ipc, uts, cgroup.
	Join []string `json:"join"`
	// FreshProc: CRIU runs in a pid namespace other than the guest's root one
	// and needs a /proc that shows it.
	FreshProc bool `json:"freshProc"`
	// Avoid are pids that CRIU must not have in its pid namespace: it takes a
	// process of another one that has its own pid for itself (get_proc_fd in
	// criu/util.c), and then sets the clocks of its own time namespace.
	Avoid []int `json:"avoid,omitempty"`
	// Cgroup is a directory of the cgroup that CRIU is moved into, and that is
	// the root of its cgroup namespace then; or empty.
	Cgroup string `json:"cgroup,omitempty"`
	// Mounts are clones of mounts of Target, each on a mount point of its own.
	Mounts []MountClone `json:"mounts,omitempty"`
	// Inherit are descriptors of Target that CRIU gets under the same number
	// plus InheritBase.
	Inherit []int `json:"inherit,omitempty"`
	// PIDNamespaceOf is a process whose pid namespace CRIU gets as the descriptor
	// [pidNamespaceFD]; or 0.
	PIDNamespaceOf int `json:"pidNamespaceOf,omitempty"`
}

// MountClone puts a copy of the mount at Path in the target's mount namespace
// on the mount point At in CRIU's.
type MountClone struct {
	Path string `json:"path"`
	At   string `json:"at"`
	// Null: where the target has no such mount, /dev/null of the guest serves.
	Null bool `json:"null,omitempty"`
}

// InheritBase keeps inherited descriptors clear of CRIU's own.
const InheritBase = 100

// pidNamespaceFD is one that no descriptor of a target's stdio becomes.
const pidNamespaceFD = InheritBase + 10

// PIDNamespaceKey is CRIU's name for a pid namespace that is not the tree's own.
const PIDNamespaceKey = "pod-pid"

// Op is one run of CRIU, with a directory of its own in the guest's memory.
type Op struct {
	dir string
	job Job
	// pidNamespaceOf is a process whose pid namespace CRIU runs in; 0: the guest's root one.
	pidNamespaceOf int
}

// NewOp makes the directory for an operation. The caller calls Close.
func NewOp(parent string, job Job, pidNamespaceOf int) (*Op, error) {
	dir, err := os.MkdirTemp(parent, "op-")
	if err != nil {
		return nil, fmt.Errorf("prepare CRIU: %w", err)
	}
	o := &Op{dir: dir, job: job, pidNamespaceOf: pidNamespaceOf}
	o.job.FreshProc = pidNamespaceOf != 0
	return o, nil
}

// Avoid keeps CRIU from having one of these pids in its pid namespace.
func (o *Op) Avoid(pids []int) { o.job.Avoid = pids }

// Close removes the operation's directory.
func (o *Op) Close() error { return os.RemoveAll(o.dir) }

// Dir is the operation's directory; CRIU's work directory, too.
func (o *Op) Dir() string { return o.dir }

// LogPath is the file of CRIU's log.
func (o *Op) LogPath() string { return filepath.Join(o.dir, logName) }

// StatsPath is the file of CRIU's statistics of a dump or restore.
func (o *Op) StatsPath(kind string) string { return filepath.Join(o.dir, statsName+kind) }

// AddMount asks for a clone of the target's mount at path and says where
// CRIU will find it.
func (o *Op) AddMount(path string, null bool) string {
	at := filepath.Join(o.dir, "mnt", fmt.Sprint(len(o.job.Mounts)))
	o.job.Mounts = append(o.job.Mounts, MountClone{Path: path, At: at, Null: null})
	return at
}

// Inherit asks for a descriptor of the target and says what number CRIU gets it under.
func (o *Op) Inherit(fd int) int32 {
	o.job.Inherit = append(o.job.Inherit, fd)
	return int32(InheritBase + fd) //nolint:gosec // 0 to 2 and the base
}

// InheritPIDNamespace asks for a process's pid namespace as a descriptor and
// says what number CRIU gets it under.
func (o *Op) InheritPIDNamespace(pid int) int32 {
	o.job.PIDNamespaceOf = pid
	return pidNamespaceFD
}

// Options are CRIU's options that every operation has. Images is the
// directory of the images.
func (o *Op) Options(images string) *rpc.CriuOpts {
	mode := rpc.CriuCgMode_IGNORE
	// iptables, CRIU's default, is not in a slim guest; nftables needs no program.
	lock := rpc.CriuNetworkLockMethod_NFTABLES
	return &rpc.CriuOpts{
		ImagesDirFd:       proto.Int32(-1), // by name: its /proc/PID/fd would be of another pid namespace
		ImagesDir:         proto.String(images),
		ConfigFile:        proto.String(filepath.Join(o.dir, confName)),
		LogLevel:          proto.Int32(4),
		LogFile:           proto.String(logName),
		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: &mode,
		NetworkLock:       &lock,
	}
}

// Dump runs a dump. The error carries the lines of CRIU's log that matter.
func (o *Op) Dump(opts *rpc.CriuOpts) error {
	return o.run("dump", func(c *gocriu.Criu) error { return c.Dump(opts, nil) })
}

// Restore runs a restore. The error carries the lines of CRIU's log that matter.
func (o *Op) Restore(opts *rpc.CriuOpts) error {
	return o.run("restore", func(c *gocriu.Criu) error { return c.Restore(opts, nil) })
}

// maxLaunches bounds how often CRIU is started until it has a pid that may be.
// Each start has a higher one.
const maxLaunches = 100

func (o *Op) run(what string, call func(*gocriu.Criu) error) error {
	if err := o.write(); err != nil {
		return fmt.Errorf("prepare criu %s: %w", what, err)
	}
	for range maxLaunches {
		err := o.runOnce(what, call)
		if !errors.Is(err, errPIDTaken) {
			return err
		}
		if err := os.Remove(filepath.Join(o.dir, launchErrorName)); err != nil {
			return fmt.Errorf("criu %s: %w", what, err)
		}
	}
	return fmt.Errorf("criu %s: %w: the processes in the images have all of them", what, errPIDTaken)
}

// errPIDTaken is the launcher's answer where it has a pid that CRIU must not have.
var errPIDTaken = errors.New("no pid is left for CRIU")

func (o *Op) runOnce(what string, call func(*gocriu.Criu) error) error {
	c := gocriu.MakeCriu()
	c.SetCriuPath(filepath.Join(o.dir, launcherName))
	err := thread.Do(func() error {
		if o.pidNamespaceOf != 0 {
			// For the children of this thread only, of which CRIU is the only one.
			if err := thread.Enter(o.pidNamespaceOf, "pid"); err != nil {
				return err
			}
		}
		return prepare(c)
	})
	if err != nil {
		return fmt.Errorf("criu %s: %w", what, err)
	}
	err = call(c)
	// Its exit code says nothing that the answer did not.
	cleanup := c.Cleanup()
	if err == nil {
		return nil
	}
	if launch, e := os.ReadFile(filepath.Join(o.dir, launchErrorName)); e == nil {
		if string(launch) == errPIDTaken.Error() {
			return errPIDTaken
		}
		return fmt.Errorf("criu %s: %s", what, launch)
	}
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, io.EOF) {
		if cleanup != nil {
			err = cleanup // says how
		}
		err = fmt.Errorf("CRIU has ended before it was done: %w", err)
	}
	return &Error{What: what, Err: err, Log: Tail(o.LogPath())}
}

// write puts the launcher, the job and CRIU's configuration file into the
// operation's directory.
func (o *Op) write() error {
	if err := os.Symlink(Agent, filepath.Join(o.dir, launcherName)); err != nil {
		return err
	}
	data, err := json.Marshal(o.job)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(o.dir, jobName), data, 0o600); err != nil {
		return err
	}
	// The work directory has no other way in by name.
	return os.WriteFile(filepath.Join(o.dir, confName), []byte("work-dir "+o.dir+"\n"), 0o600)
}
