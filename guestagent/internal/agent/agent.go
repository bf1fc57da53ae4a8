// SPDX-License-Identifier: Apache-2.0

// Package agent is the daemon in Kata's VM that freezes, checkpoints and
// restores containers beside the kata-agent, at the request of the shim
// (package plugin) on the host.
//
// Kata's guest hook starts it once in each VM, as root in the guest's root
// namespaces. It serves the protocol of package api over AF_VSOCK to the host
// only. The order of calls for a container is Adopt (between Kata's Create and
// Start), then Freeze, Checkpoint and Thaw any number of times, or
// CheckRestore, Kata's Start, and Restore once; Forget at the end.
//
// A file serves a call or a concern: checkpoint.go and restore.go drive package
// criu, lease.go keeps track of which shims are there, takeover.go cleans up
// after an agent that has died. What only looks at processes is in package
// inspect.
//
// The package relies on Kata 4.1.0 (the kata-agent's files and cgroups), CRIU
// 4.2 and Linux 6.18.
package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// leaseGrace is how long containers stay frozen after the lease of their owner
// has ended, so that it can reconnect.
const leaseGrace = 3 * time.Second

// forgetTimeout bounds the end of the operation in progress on a container that
// is deleted.
const forgetTimeout = time.Minute

// Agent implements the service of package api.
type Agent struct {
	dir string

	mu sync.Mutex // records of containers
	// ops serialises what changes a container. Thaw waits for none of it but a
	// dump.
	ops   operations
	turns turns

	leases leases
	execs  execs

	criu *toolchain
}

// New prepares the agent's directory. CRIU is loaded from the guest bundle when
// it is first needed.
func New(bundle string) (*Agent, error) {
	a := &Agent{dir: api.StateDir, criu: newToolchain(bundle)}
	a.leases.expired = a.thawAll
	if err := a.prepare(); err != nil {
		return nil, err
	}
	return a, nil
}

// prepare mounts the agent's directory, unless an earlier agent has.
func (a *Agent) prepare() error {
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return err
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, a.dir, 0, 0, &st); err != nil {
		return &os.PathError{Op: "statx", Path: a.dir, Err: err}
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		size, err := stateSize()
		if err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", a.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("mode=700,size=%d", size)); err != nil {
			return fmt.Errorf("mount %s: %w", a.dir, err)
		}
	}
	// Mounts below it must not propagate to containers that Kata creates later.
	if err := unix.Mount("", a.dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %s private: %w", a.dir, err)
	}
	for _, d := range []string{"containers", "exchange", "ops"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// maxState bounds what the agent keeps in the guest's memory, in bytes: CRIU, some
// 25 MiB, and logs. How much CRIU logs of a container depends on the container, and
// no cgroup is charged for it.
const maxState = 128 << 20

// stateSize is the size of the agent's directory: as any tmpfs, it has at most half
// of the memory.
func stateSize() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("read the size of the memory: %w", err)
	}
	return min(maxState, info.Totalram*uint64(info.Unit)/2), nil
}

// processors is how many processors are online. Go's own count is of the
// program's start, and Kata adds processors to a VM that runs.
func processors() uint32 {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	n := uint32(0)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "cpu"); ok && !strings.HasPrefix(rest, " ") {
			n++
		}
	}
	return n
}

// Info implements the service.
func (a *Agent) Info(ctx context.Context, r *api.InfoRequest) (*api.InfoResponse, error) {
	out := &api.InfoResponse{Protocol: api.ProtocolVersion, OldestProtocol: api.OldestProtocol, Version: version.Version, KernelRelease: kernelRelease(), BootId: bootID(), Processors: processors()}
	if r.GetCheck() {
		v, check, tracks, err := a.criu.inspect(ctx)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		out.CriuVersion, out.CriuCheck, out.PreDump = v, text.Lines(check, text.MaxError), tracks
		if err != nil {
			out.Problems = append(out.Problems, text.Lines(err.Error(), text.MaxError))
		}
	}
	return out, nil
}

// Adopt implements the service.
func (a *Agent) Adopt(ctx context.Context, r *api.AdoptRequest) (*api.AdoptResponse, error) {
	id := r.GetContainerId()
	if err := checkID(id); err != nil {
		return nil, errclass.ToRPC(err)
	}
	ctx, end, err := a.ops.begin(ctx, id, change)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	if c, err := a.running(id); err == nil {
		return &api.AdoptResponse{Pid: int32(c.Init.PID)}, nil //nolint:gosec // a pid
	}
	c, err := find(id)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	// What an earlier container of the same id has left, if it was never
	// forgotten.
	if err := errclass.Join(a.release(id), cgroup.Remove(ctx, filepath.Join(c.Cgroup, restoredCgroup))); err != nil {
		return nil, errclass.ToRPC(err)
	}
	if err := withdraw(c.Init, r.GetExchangeDestination(), r.GetToken(), a.exchangePath(id)); err != nil {
		return nil, errclass.ToRPC(err)
	}
	if r.GetGuarded() {
		c.Token = r.GetToken()
	}
	c.Owner = r.GetOwner()
	err = c.noteMounts()
	if err == nil {
		err = a.save(c)
	}
	if err != nil {
		return nil, errclass.ToRPC(errclass.Join(err, a.release(id)))
	}
	log.G(ctx).WithFields(log.Fields{"container": id, "pid": c.Init.PID, "cgroup": c.Cgroup}).Info("container adopted")
	return &api.AdoptResponse{Pid: int32(c.Init.PID)}, nil //nolint:gosec // a pid
}

// Forget implements the service.
func (a *Agent) Forget(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	id := r.GetContainerId()
	if err := checkID(id); err != nil {
		return nil, errclass.ToRPC(err)
	}
	a.ops.interrupt(id, errForgotten, change, freezing, dumping)
	// The caller does not wait long, and does not ask again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTimeout)
	defer cancel()
	ctx, end, err := a.ops.begin(ctx, id, change)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	a.leases.thawed(id)
	a.turns.forget(id)
	var left error
	if c, err := a.load(id); err == nil {
		left = errclass.Join(a.unlockNetwork(ctx, c), c.forgetCgroup(ctx))
	}
	err = os.Remove(a.recordPath(id))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err := errclass.Join(left, err, a.release(id)); err != nil {
		return nil, errclass.ToRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Hold implements the service: a lease that lasts as long as the connection.
func (a *Agent) Hold(ctx context.Context, r *api.HoldRequest) (*emptypb.Empty, error) {
	a.leases.begin(r.GetOwner())
	defer a.leases.end(r.GetOwner(), leaseGrace)
	<-ctx.Done()
	return nil, ctx.Err()
}

// Freeze implements the service.
func (a *Agent) Freeze(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	ctx, end, err := a.ops.begin(ctx, r.GetContainerId(), freezing)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if a.turns.over(c.ID, r.GetTurn()) {
		return nil, errclass.ToRPC(errclass.Precondition(errcode.Thawed, "freeze container %s: %w", c.ID, errThawed))
	}
	if err := c.freeze(ctx); err != nil {
		return nil, errclass.ToRPC(c.explain(err))
	}
	if err = c.writeOut(ctx); err == nil {
		err = a.ops.complete(ctx, func() { a.leases.frozen(c.ID, c.Owner) })
	}
	if err != nil {
		return nil, errclass.ToRPC(errclass.Join(c.explain(err), cgroup.Thaw(c.tree())))
	}
	return &emptypb.Empty{}, nil
}

// Why an operation was interrupted.
var (
	errThawed    = errcode.Thawed.Wrap(errors.New("the container was thawed meanwhile"))
	errForgotten = errcode.Killed.Wrap(errors.New("the container was deleted meanwhile"))
)

// Thaw implements the service.
func (a *Agent) Thaw(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	_, err := a.thaw(ctx, r.GetContainerId(), r.GetTurn(), func() bool { return true })
	return &emptypb.Empty{}, errclass.ToRPC(err)
}

// thaw thaws a container, if that is still wanted, and reports whether it was. A
// Freeze in progress, which may wait for a file system that does not answer, is
// not waited for: it thaws what it has frozen. A dump is: it is cancelled, and
// ends soon.
func (a *Agent) thaw(ctx context.Context, id string, turn uint64, wanted func() bool) (bool, error) {
	c, err := a.load(id)
	if err != nil || !wanted() {
		return false, err
	}
	a.turns.thaw(id, turn) // before it looks for a Freeze in progress
	if kind, busy := a.ops.interrupt(id, errThawed, freezing, dumping); !busy || kind != freezing {
		opCtx, end, err := a.ops.begin(ctx, id, change)
		if err != nil {
			return false, err
		}
		defer end()
		ctx = opCtx
		// It may have been forgotten or restored meanwhile, or have a new owner.
		if c, err = a.load(id); err != nil || !wanted() {
			return false, err
		}
	}
	if err := errclass.Join(a.unlockNetwork(ctx, c), cgroup.Thaw(c.tree())); err != nil {
		return false, err
	}
	a.leases.thawed(id)
	return true, nil
}

// The pauses between attempts to thaw a container without an owner, and the
// time that each may take.
const (
	firstThawPause = 100 * time.Millisecond
	lastThawPause  = 10 * time.Second
	thawTimeout    = time.Minute
)

// thawAll thaws the containers whose owner is gone, each as soon as it can be,
// unless another owner comes first.
func (a *Agent) thawAll(ids []string) {
	for _, id := range ids {
		go a.thawOrphan(id)
	}
}

func (a *Agent) thawOrphan(id string) {
	logger := log.L.WithField("container", id)
	orphaned := func() bool { return a.leases.orphaned(id) }
	for pause := firstThawPause; orphaned(); pause = min(2*pause, lastThawPause) {
		ctx, cancel := context.WithTimeout(context.Background(), thawTimeout)
		thawed, err := a.thaw(ctx, id, 0, orphaned)
		cancel()
		switch {
		case errdefs.IsNotFound(err):
			a.leases.thawed(id) // forgotten
		case err != nil:
			logger.WithError(err).Error("failed to thaw a container whose shim is gone")
			retry := time.NewTimer(pause)
			<-retry.C
		case thawed:
			logger.Warn("container thawed: the shim that froze it is gone")
		}
	}
}
