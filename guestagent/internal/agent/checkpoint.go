// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/outcome"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/sockopt"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// CheckCheckpoint implements the service.
func (a *Agent) CheckCheckpoint(ctx context.Context, r *api.CheckpointRequest) (*emptypb.Empty, error) {
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	// What is over in a moment is no reason to refuse a container that runs.
	for end := time.Now().Add(passingWait); ; {
		_, _, findings, err := a.findings(ctx, c, r)
		if err == nil && inspect.Passing(findings) && time.Now().Before(end) {
			select {
			case <-ctx.Done():
			case <-time.After(passingPause):
				continue
			}
		}
		if err == nil {
			err = judge(ctx, c, findings)
		}
		if err != nil {
			return nil, errclass.ToRPC(c.explain(err))
		}
		return &emptypb.Empty{}, nil
	}
}

// For how long, and after which pauses, a container is looked at again where a
// checkpoint would be possible in a moment.
const (
	passingWait  = 300 * time.Millisecond
	passingPause = 20 * time.Millisecond
)

// inspect looks at a container's processes, and reports whether its IPC
// namespace has to be dumped. Its error names everything that forbids a
// checkpoint; what is only worth knowing is logged.
func (a *Agent) inspect(ctx context.Context, c *container, r *api.CheckpointRequest) (_ *inspect.Container, ownIPC bool, _ error) {
	look, ownIPC, findings, err := a.findings(ctx, c, r)
	if err != nil {
		return nil, false, err
	}
	return look, ownIPC, judge(ctx, c, findings)
}

// judge logs what findings warn of, and returns an error with all that forbids a
// checkpoint.
func judge(ctx context.Context, c *container, findings []inspect.Finding) error {
	for _, f := range findings {
		if f.Class != inspect.Refused {
			log.G(ctx).WithField("container", c.ID).Warn(f.String())
		}
	}
	return inspect.Refusal(findings)
}

func (a *Agent) findings(ctx context.Context, c *container, r *api.CheckpointRequest) (_ *inspect.Container, ownIPC bool, _ []inspect.Finding, _ error) {
	pids, err := c.pids()
	if err != nil {
		return nil, false, nil, err
	}
	look, err := inspect.Look(ctx, c.root().PID, pids, c.Mounts)
	if err != nil {
		return nil, false, nil, err
	}
	findings, err := look.Check(c.Stdio, r.GetOptions())
	if err != nil {
		return nil, false, nil, err
	}
	mounts, err := look.CheckMounts(r.GetExternals())
	if err != nil {
		return nil, false, nil, err
	}
	findings = append(findings, mounts...)
	device, err := c.shm()
	if err != nil {
		return nil, false, nil, err
	}
	findings = append(findings, look.CheckTerminals(c.Stdio)...)
	if r.GetRights() != nil {
		more, err := excesses(look, r.GetRights())
		if err != nil {
			return nil, false, nil, err
		}
		findings = append(findings, more...)
	}
	shm, err := look.CheckShm(device)
	if err != nil {
		return nil, false, nil, err
	}
	findings = append(findings, shm...)
	names, err := look.CheckNames(ctx, r.GetExternals())
	if err != nil {
		return nil, false, nil, err
	}
	findings = append(findings, names...)
	others, err := a.otherProcesses(ctx, c.ID)
	if err != nil {
		return nil, false, nil, err
	}
	ownIPC, more, err := look.CheckIPC(others)
	if err != nil {
		return nil, false, nil, err
	}
	findings = append(findings, more...)
	cgroups, err := ownCgroups(c, look)
	if err != nil {
		return nil, false, nil, err
	}
	return look, ownIPC, append(findings, cgroups...), nil
}

// excesses are findings about processes that have more than their container.
func excesses(look *inspect.Container, r *api.Rights) (out []inspect.Finding, err error) {
	processes := make(map[int]*inspect.Process, len(look.Processes))
	pids := make([]int, 0, len(look.Processes))
	for _, p := range look.Processes {
		processes[p.PID] = p
		pids = append(pids, p.PID)
	}
	found, err := outcome.Excesses(look.Root.PID, pids, r)
	if err != nil {
		return nil, err
	}
	what := make(map[int][]string)
	for _, e := range found {
		what[e.PID] = append(what[e.PID], e.What)
	}
	for _, pid := range pids {
		if len(what[pid]) > 0 {
			out = append(out, look.Refuse(processes[pid], errcode.MoreRights, strings.Join(what[pid], " and ")+", so that no restore would let it run", "terminate it before the checkpoint"))
		}
	}
	return out, nil
}

// otherProcesses are those of the sandbox's other containers.
func (a *Agent) otherProcesses(ctx context.Context, id string) ([]*inspect.Process, error) {
	containers, err := a.containers()
	if err != nil {
		return nil, err
	}
	var out []*inspect.Process
	for _, c := range containers {
		if c.ID == id {
			continue
		}
		pids, err := cgroup.Procs(c.tree(), true)
		if err != nil {
			continue // it has ended
		}
		processes, err := inspect.Processes(ctx, pids)
		if err != nil {
			return nil, err
		}
		out = append(out, processes...)
	}
	return out, nil
}

// Checkpoint implements the service.
func (a *Agent) Checkpoint(ctx context.Context, r *api.CheckpointRequest) (*api.CheckpointResponse, error) {
	ctx, end, err := a.ops.begin(ctx, r.GetContainerId(), dumping)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	images, err := a.inExchange(c.ID, r.GetDirectory())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if frozen, err := cgroup.Frozen(c.tree()); err != nil || !frozen {
		return nil, errclass.ToRPC(c.explain(errclass.Join(errclass.Precondition(errcode.NotFrozen, "container %s is not frozen", c.ID), err)))
	}
	if err := os.Mkdir(images, 0o700); err != nil {
		return nil, errclass.ToRPC(fmt.Errorf("make the directory for the images: %w", err))
	}
	out, err := a.checkpoint(ctx, c, r, images)
	if err != nil {
		return nil, errclass.ToRPC(errclass.Join(c.explain(err), keepLogs(images), stayFrozen(c)))
	}
	if out.GetThawed() {
		a.leases.thawed(c.ID) // not earlier: after a failure it is frozen again
	}
	return out, nil
}

// thawDumped thaws a container whose dump is done, unless the dump was
// interrupted. A Freeze of an earlier turn has no effect from here on.
func (a *Agent) thawDumped(ctx context.Context, c *container, turn uint64) (err error) {
	a.turns.thaw(c.ID, turn)
	if e := a.ops.complete(ctx, func() { err = cgroup.Thaw(c.tree()) }); e != nil {
		return e
	}
	return err
}

// keepLogs removes from the directory of a dump that failed what is not CRIU's
// log or statistics, which the shim copies. It then discards the directory.
func keepLogs(images string) error {
	entries, err := os.ReadDir(images)
	for _, e := range entries {
		if name := e.Name(); name != imageset.DumpLogName && name != imageset.StatsName {
			err = errclass.Join(err, os.RemoveAll(filepath.Join(images, name)))
		}
	}
	return err
}

// Discard implements the service. It takes no lock: it neither disturbs nor
// waits for the container's other operations.
func (a *Agent) Discard(_ context.Context, r *api.DiscardRequest) (*emptypb.Empty, error) {
	c, err := a.load(r.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &emptypb.Empty{}, nil
	}
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	images, err := a.inExchange(c.ID, r.GetDirectory())
	if err == nil {
		err = os.RemoveAll(images)
	}
	if err != nil {
		return nil, errclass.ToRPC(fmt.Errorf("discard the images of container %s: %w", c.ID, err))
	}
	return &emptypb.Empty{}, nil
}

// stayFrozen freezes a container again after a checkpoint that failed: CRIU thaws
// what it dumps and freezes it again at the end, unless it is killed, and the
// container may have been thawed after the dump. That of the checkpoint may be why
// it failed, so that it has a context of its own.
func stayFrozen(c *container) error {
	frozen, err := cgroup.Frozen(c.tree())
	if err != nil || frozen {
		return nil // the container has exited
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	return cgroup.Freeze(ctx, c.tree())
}

func (a *Agent) checkpoint(ctx context.Context, c *container, r *api.CheckpointRequest, images string) (_ *api.CheckpointResponse, err error) {
	ph := newPhases(ctx, "checkpoint", c.ID)
	out := &api.CheckpointResponse{KernelRelease: kernelRelease(), Stdio: c.Stdio}
	look, ownIPC, err := a.inspect(ctx, c, r)
	if err != nil {
		return nil, err
	}
	if err := inspect.Refusal(look.Forking()); err != nil {
		return nil, err
	}
	op, err := a.describe(ctx, c, look, ownIPC, r, out)
	if err != nil {
		return nil, err
	}
	defer op.Close()
	defer func() {
		if err == nil {
			return
		}
		if e := copyLogs(op, images); e != nil && !errors.Is(e, fs.ErrNotExist) {
			log.G(ctx).WithField("container", c.ID).WithError(e).Warn("failed to copy CRIU's log")
		}
	}()
	out.TcpEstablished = keepsConnections(look.Connections, r.GetOptions())
	var kept []inspect.Connection
	if out.GetTcpEstablished() {
		kept = look.Connections
		if r.GetOptions().GetTcpEstablished() {
			// Its peer may have closed its own direction only.
			for i := range kept {
				kept[i].Ended = false
			}
		}
		out.Connections = connectionMessages(inspect.Outside(kept))
	}
	defer func() {
		if err != nil {
			// Not with ctx, whose end may be why.
			err = errclass.Join(err, removeCRIULock(op), a.unlockNetwork(context.WithoutCancel(ctx), c), removeLinkRemaps(look))
		}
	}()
	if len(kept) > 0 {
		var locked []inspect.Connection
		if r.GetStop() {
			locked = inspect.Outside(kept)
		}
		// CRIU locks all of them for the time of the dump.
		if c.KeepAlive, err = netlock.KeepAlive(kept); err != nil {
			return nil, err
		}
		if err := a.lockNetwork(c, locked); err != nil {
			return nil, err
		}
		if err := netlock.SetKeepAlive(kept, c.KeepAlive, false); err != nil {
			return nil, err
		}
		op.Guard(socketsOf(kept))
	}
	opts := dumpOptions(op, c, r.GetOptions(), out, images)
	op.ShareCgroupNamespace(look.CgroupNamespaces())
	if err := shareNamespace(opts, c.root().PID); err != nil {
		return nil, err
	}
	if parents := r.GetParents(); len(parents) > 0 {
		opts.TrackMem, opts.ParentImg = proto.Bool(true), proto.String(parentImages(parents[len(parents)-1]))
	}
	if opts.IrmapScanPaths, err = look.FileMounts(ctx); err != nil {
		return nil, err
	}
	ph.done("inspect")

	if err := removeLinkRemaps(look); err != nil {
		return nil, fmt.Errorf("remove the links of an earlier dump: %w", err)
	}
	// Both write files of their own and only read what is frozen.
	shm := make(chan error, 1)
	go func() { shm <- saveShm(ctx, c, filepath.Join(images, imageset.DevShmName)) }()
	defer dropBehind(images, dropBehindFrom)()
	err = op.Dump(ctx, opts)
	ph.done("criu dump")
	// A caller that has given up meanwhile gets no image set, even if CRIU has
	// finished it.
	err = errclass.Join(err, <-shm, ctx.Err())
	ph.done("save /dev/shm")
	if err != nil {
		return nil, err
	}
	mounts, err := inspect.Mounts(c.root().PID)
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the container: %w", err)
	}
	keepAlive := c.KeepAlive // which is over when it is noted
	if r.GetStop() {
		err = netlock.EnterRepair(kept)
	} else if len(kept) > 0 {
		// CRIU has unlocked them.
		err = errclass.Join(netlock.SetKeepAlive(kept, c.KeepAlive, true), a.noteUnlocked(c))
	}
	if err != nil {
		return nil, err
	}
	if r.GetThaw() {
		if err := a.thawDumped(ctx, c, r.GetTurn()); err != nil {
			return nil, err
		}
		out.Thawed = true
		ph.done("thaw")
	}

	// What follows needs the images only.
	if err := a.foldParents(ctx, c.ID, r); err != nil {
		return nil, err
	}
	inImages := func(path string) bool { return inspect.InImages(path, mounts, out.GetExternals()) }
	if err := mendImages(images, look.Names, look.Connections, keepAlive, inImages); err != nil {
		return nil, fmt.Errorf("mend the images: %w", err)
	}
	if err := copyLogs(op, images); err != nil {
		return nil, err
	}
	ph.done("copy logs")
	out.Phases = ph.list
	return out, nil
}

// describe records what the restore needs to know and prepares the run of CRIU.
func (a *Agent) describe(ctx context.Context, c *container, look *inspect.Container, ownIPC bool, r *api.CheckpointRequest, out *api.CheckpointResponse) (*criu.Op, error) {
	root := c.root().PID
	mounts, err := inspect.Mounts(root)
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the container: %w", err)
	}
	guest, err := inspect.Mounts(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the guest: %w", err)
	}
	out.Externals = inspect.Externals(inspect.Given(mounts, c.Mounts), guest, r.GetExternals())
	if out.OpenFiles, err = look.OpenFiles(ctx); err != nil {
		return nil, fmt.Errorf("list the open files of the container: %w", err)
	}
	for _, f := range out.OpenFiles {
		if now := look.Names.Files[string(f.GetPath())]; now != "" {
			f.Path = []byte(now) // by which the restore opens it
		}
	}
	for _, a := range look.Addresses {
		if text.Line(a.Interface, len(a.Interface)) != a.Interface {
			continue // whoever may configure the guest's network may choose any bytes
		}
		out.Addresses = append(out.Addresses, &api.Address{Interface: a.Interface, Address: a.Addr.WithZone("").String()})
	}
	if out.Attributes, err = readAttributes(ctx, c, look); err != nil {
		return nil, err
	}
	if out.Sockets, err = sockopt.Read(look.Sockets()); err != nil {
		return nil, err
	}
	hostname, err := inspect.Hostname(root)
	if err != nil {
		return nil, err
	}
	out.Hostname = text.Line(hostname, len(hostname))
	if out.CpuFeatures, err = cpuFeatures(); err != nil {
		return nil, err
	}
	if out.CriuVersion, err = a.criu.version(); err != nil {
		return nil, err
	}
	// CRIU leaves namespaces that it is in itself out of the image set: these
	// are the sandbox's, not the container's. An IPC namespace with objects of
	// the container's own is not joined: it goes into the image set, and the
	// restore recreates it for the container alone. Nor is the cgroup namespace:
	// cgroup2 is mounted with nsdelegate, and nothing can be frozen from inside.
	join := []string{"uts"}
	if !ownIPC {
		join = append(join, "ipc")
	}
	return criu.NewOp(filepath.Join(a.dir, "ops"), launch.Job{Target: root, Join: join}, 0)
}

// shareNamespace marks a PID namespace that is not the container's own as
// external: CRIU leaves it out, and is given one at the restore.
func shareNamespace(opts *rpc.CriuOpts, root int) error {
	own, err := inspect.OwnPIDNamespace(root)
	if err != nil || own {
		return err
	}
	var st unix.Stat_t
	path := fmt.Sprintf("/proc/%d/ns/pid", root)
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	opts.External = append(opts.External, fmt.Sprintf("pid[%d]:%s", st.Ino, criu.PIDNamespaceKey))
	return nil
}

func dumpOptions(op *criu.Op, c *container, o *api.CheckpointOptions, out *api.CheckpointResponse, images string) *rpc.CriuOpts {
	opts := op.Options(images)
	opts.Pid = proto.Int32(int32(c.root().PID)) //nolint:gosec // a pid
	// The shim kills the container, if it is to stop, once the image set is
	// safe.
	opts.LeaveRunning = proto.Bool(true)
	// Without it CRIU waits forever for tasks that are already frozen.
	opts.FreezeCgroup = proto.String(c.tree())
	opts.GhostLimit = proto.Uint32(inspect.GhostLimit)
	// For the dump alone, see mendImages.
	opts.LinkRemap = proto.Bool(true)
	applyOptions(opts, o)
	opts.TcpEstablished = proto.Bool(out.GetTcpEstablished())
	// A connection that nobody has accepted yet would refuse the checkpoint of any
	// server that a probe or a client has just reached. Its client gets a reset.
	opts.TcpSkipInFlight = proto.Bool(true)
	for _, e := range out.GetExternals() {
		opts.External = append(opts.External, fmt.Sprintf("mnt[%s]:%s", e.GetDestination(), e.GetName()))
	}
	for _, s := range out.GetStdio() {
		if inspect.IsTTY(s.GetKey()) && !slices.Contains(opts.External, s.GetKey()) {
			opts.External = append(opts.External, s.GetKey())
		}
	}
	return opts
}

// applyOptions sets the options that a dump and its restore must agree on.
func applyOptions(opts *rpc.CriuOpts, o *api.CheckpointOptions) {
	opts.TcpEstablished = proto.Bool(o.GetTcpEstablished())
	opts.TcpClose = proto.Bool(o.GetTcpClose())
	opts.ExtUnixSk = proto.Bool(o.GetExternalUnixSockets())
	opts.ShellJob = proto.Bool(o.GetTerminal())
	opts.FileLocks = proto.Bool(o.GetFileLocks())
	if slices.Contains(o.GetEmptyNamespaces(), "network") {
		opts.EmptyNs = proto.Uint32(unix.CLONE_NEWNET)
	}
}

// copyLogs copies CRIU's log and statistics to the directory of the images. After
// a failure there may be no statistics, or neither.
func copyLogs(op *criu.Op, images string) error {
	return errclass.Join(copyOut(op.LogPath(), filepath.Join(images, imageset.DumpLogName)), copyOut(op.StatsPath("dump"), filepath.Join(images, imageset.StatsName)))
}

func copyOut(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errclass.Join(err, dst.Close())
}
