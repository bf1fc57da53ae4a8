// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Names in an operation's directory.
const (
	launcherName = "criu" // a link to the launcher
	confName     = "criu.conf"
	logName      = "criu.log"
	statsName    = "stats-"
)

// PIDNamespaceKey is the external key of a PID namespace that the tree shares.
const PIDNamespaceKey = "pod-pid"

// Op is one run of CRIU, with a directory of its own in the guest's memory.
type Op struct {
	dir string
	job launch.Job
	// pidNamespaceOf is a process whose PID namespace CRIU runs in; 0: the
	// guest's root one.
	pidNamespaceOf int
	// forks: the work is done by a child of CRIU's.
	forks bool
}

// NewOp creates the directory of an operation. The caller calls Close.
func NewOp(parent string, job launch.Job, pidNamespaceOf int) (*Op, error) {
	dir, err := os.MkdirTemp(parent, "op-")
	if err != nil {
		return nil, fmt.Errorf("prepare CRIU: %w", err)
	}
	o := &Op{dir: dir, job: job, pidNamespaceOf: pidNamespaceOf}
	o.job.FreshProc = pidNamespaceOf != 0
	return o, nil
}

// Avoid keeps CRIU from having one of these PIDs in its PID namespace.
func (o *Op) Avoid(pids []int) { o.job.Avoid = pids }

// ShareCgroupNamespace has CRIU take processes for ones in the target's cgroup
// namespace. It has no way to dump another one.
func (o *Op) ShareCgroupNamespace(pids []int) { o.job.CgroupNamespaces = pids }

// Guard keeps TCP connections usable if CRIU is killed in the dump.
func (o *Op) Guard(sockets []launch.Socket) { o.job.Sockets = sockets }

// Close removes the operation's directory.
func (o *Op) Close() error { return os.RemoveAll(o.dir) }

// Dir is the operation's directory and CRIU's work directory.
func (o *Op) Dir() string { return o.dir }

// LogPath is the file of CRIU's log.
func (o *Op) LogPath() string { return filepath.Join(o.dir, logName) }

// StatsPath is the file of CRIU's statistics of a dump or restore.
func (o *Op) StatsPath(kind string) string { return filepath.Join(o.dir, statsName+kind) }

// AddMount requests a clone of the target's mount at path and returns where
// CRIU will find it.
func (o *Op) AddMount(path string, null bool) string {
	at := filepath.Join(o.dir, "mnt", fmt.Sprint(len(o.job.Mounts)))
	o.job.Mounts = append(o.job.Mounts, launch.MountClone{Path: path, At: at, Null: null})
	return at
}

// Inherit requests a descriptor of the target and returns its number in CRIU.
func (o *Op) Inherit(fd int) int32 {
	o.job.Inherit = append(o.job.Inherit, fd)
	return int32(launch.InheritBase + fd) //nolint:gosec // 0 to 2 and the base
}

// InheritPIDNamespace requests a descriptor of a process's PID namespace and
// returns its number in CRIU.
func (o *Op) InheritPIDNamespace(pid int) int32 {
	o.job.PIDNamespaceOf = pid
	return launch.PIDNamespaceFD
}

// Options returns the options that every operation has, for a directory of
// images.
func (o *Op) Options(images string) *rpc.CriuOpts {
	mode := rpc.CriuCgMode_IGNORE
	// CRIU's default needs the iptables program, which guests lack.
	lock := rpc.CriuNetworkLockMethod_NFTABLES
	return &rpc.CriuOpts{
		ImagesDirFd:       proto.Int32(-1), // by name: /proc/PID/fd would be that of another PID namespace
		ImagesDir:         proto.String(images),
		ConfigFile:        proto.String(filepath.Join(o.dir, confName)),
		LogLevel:          proto.Int32(4),
		LogFile:           proto.String(logName),
		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: &mode,
		NetworkLock:       &lock,
	}
}

// StopGrace is the time that a dump has to finish once nobody wants it any
// longer, before CRIU is killed: what it dumps is best left by CRIU itself.
const StopGrace = 5 * time.Second

// Dump runs a dump. An error of CRIU's is an [*Error]. When
// ctx is done, CRIU is killed after [StopGrace].
func (o *Op) Dump(ctx context.Context, opts *rpc.CriuOpts) error {
	return o.run(ctx, dumping, waitGrace, &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: opts}, nil)
}

// PreDump copies the memory of processes that run, which it stops for a moment. An
// error of CRIU's is an [*Error]. When ctx is done, CRIU is killed after
// [StopGrace].
func (o *Op) PreDump(ctx context.Context, opts *rpc.CriuOpts) error {
	// CRIU forks for it (criu/cr-service.c, pre_dump_using_req).
	o.forks = true
	return o.run(ctx, "pre-dump", waitGrace, &rpc.CriuReq{Type: rpc.CriuReqType_SINGLE_PRE_DUMP.Enum(), Opts: opts}, nil)
}

// waitGrace waits for the end of a dump.
func waitGrace(done <-chan struct{}) {
	timer := time.NewTimer(StopGrace)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
}

// Stages are called while a restore waits at a stage. If one returns an error,
// CRIU is killed, which lets go of what it has restored: Restored has killed it
// then.
type Stages struct {
	// Created: all processes exist. From here on CRIU makes none, and needs not
	// be in their cgroup. PID is CRIU's.
	Created func(pid int) error
	// Restored: all processes are as they were, and are about to run. CRIU holds
	// each thread by ptrace: none has executed an instruction of its own.
	Restored func() error
	// Abandoned kills what has been restored, before CRIU is killed at the end of
	// the context.
	Abandoned func()
}

// Restore runs a restore. An error of CRIU's is an [*Error].
// When ctx is done, CRIU is killed.
func (o *Op) Restore(ctx context.Context, opts *rpc.CriuOpts, stages Stages) error {
	opts.NotifyScripts = proto.Bool(true)
	abandon := func(<-chan struct{}) { stages.Abandoned() }
	return o.run(ctx, restoring, abandon, &rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: opts}, func(stage string, pid int) error {
		switch stage {
		case "post-restore":
			return stages.Created(pid)
		case "pre-resume":
			return stages.Restored()
		}
		return nil
	})
}

// What CRIU is started for, as the errors name it.
const (
	dumping   = "dump"
	restoring = "restore"
)

// maxLaunches bounds how often CRIU is started until it has a PID that it may
// have. Each start has a higher one.
const maxLaunches = 100

func (o *Op) run(ctx context.Context, what string, abandon func(done <-chan struct{}), req *rpc.CriuReq, notify func(stage string, pid int) error) error {
	if err := o.write(); err != nil {
		return fmt.Errorf("prepare criu %s: %w", what, err)
	}
	for range maxLaunches {
		err := o.runOnce(ctx, what, abandon, req, notify)
		if !errors.Is(err, launch.ErrPIDTaken) {
			return err
		}
		if err := os.Remove(filepath.Join(o.dir, launch.ErrorName)); err != nil {
			return fmt.Errorf("criu %s: %w", what, err)
		}
	}
	return fmt.Errorf("criu %s: %w: the processes in the images use all of them", what, launch.ErrPIDTaken)
}

func (o *Op) runOnce(ctx context.Context, what string, abandon func(done <-chan struct{}), req *rpc.CriuReq, notify func(stage string, pid int) error) error {
	var s *service
	err := thread.Do(func() (err error) {
		if o.pidNamespaceOf != 0 {
			// It is in effect for this thread's children: CRIU only.
			if err := thread.Enter(o.pidNamespaceOf, "pid"); err != nil {
				return err
			}
		}
		s, err = startService(filepath.Join(o.dir, launcherName), o.job.Cgroup, o.forks)
		return err
	})
	if err != nil {
		return fmt.Errorf("criu %s: %w", what, err)
	}
	s.guarded = len(o.job.Sockets) > 0
	stop := s.watch(ctx, abandon)
	var own error // not CRIU's
	_, err = s.call(req, func(stage string) error {
		own = notify(stage, s.pid())
		return own
	})
	stop()
	status := s.close()
	if err == nil {
		return nil // the exit code adds nothing to CRIU's response
	}
	if own != nil {
		return own
	}
	if ctx.Err() != nil {
		return fmt.Errorf("criu %s: %w", what, context.Cause(ctx))
	}
	if text, e := os.ReadFile(filepath.Join(o.dir, launch.ErrorName)); e == nil {
		if string(text) == launch.ErrPIDTaken.Error() {
			return launch.ErrPIDTaken
		}
		return fmt.Errorf("criu %s: %s", what, text)
	}
	first, advice, code := cause(o.LogPath())
	switch {
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE), errors.Is(err, io.EOF):
		if status != nil {
			err = status
		}
		err = fmt.Errorf("CRIU has exited before it was done: %w", err)
	case first != "": // more than CRIU's response has
		err = errors.New(first)
	}
	switch {
	case code != 0:
	case what == restoring:
		code = errcode.RestoreFailed
	default:
		code = errcode.DumpFailed
	}
	return code.Wrap(&Error{What: what, Err: err, Advice: advice})
}

// write creates the launcher, the job and CRIU's configuration file in the
// operation's directory.
func (o *Op) write() error {
	if err := os.Symlink(Launcher, filepath.Join(o.dir, launcherName)); err != nil {
		return err
	}
	o.job.Program, o.job.Env = binary, []string{pathEnv}
	data, err := json.Marshal(o.job)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(o.dir, launch.JobName), data, 0o600); err != nil {
		return err
	}
	// The RPC has no option for a work directory by name.
	return os.WriteFile(filepath.Join(o.dir, confName), []byte("work-dir "+o.dir+"\n"), 0o600)
}
