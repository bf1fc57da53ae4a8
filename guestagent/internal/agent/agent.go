// Package agent is the daemon in Kata's VM that freezes, checkpoints and
// restores containers beside the kata-agent, at the request of the shim
// (package plugin) on the host.
//
// It is started once a VM by Kata's guest hook, as root in the guest's root
// namespaces, and serves the protocol of package api over AF_VSOCK to the host
// alone. The order of calls for a container is Adopt (between Kata's Create
// and Start), then Freeze, Checkpoint and Thaw any number of times, or
// CheckRestore, Kata's Start, and Restore once; Forget at the end.
package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// holdGrace is how long a frozen container waits for another owner after the
// connection of its owner broke.
const holdGrace = 3 * time.Second

// Agent implements the service of package api.
type Agent struct {
	dir string

	mu sync.Mutex // records of containers
	// ops serialises Freeze, Thaw, Checkpoint and Restore of a container.
	ops keyedMutex

	hold holders

	criu *toolchain

	// spawner forks execs into restored containers.
	spawner enter.Spawner
}

// New prepares the agent's directory. CRIU is taken from the guest bundle when
// it is first needed.
func New(bundle string) (*Agent, error) {
	a := &Agent{dir: api.StateDir, criu: newToolchain(bundle)}
	a.hold.expired = a.thawAll
	a.spawner.Command = a.spawnCommand
	if err := a.prepare(); err != nil {
		return nil, err
	}
	return a, nil
}

// prepare mounts the agent's directory, unless an earlier agent did.
func (a *Agent) prepare() error {
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return err
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, a.dir, 0, 0, &st); err != nil {
		return &os.PathError{Op: "statx", Path: a.dir, Err: err}
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		if err := unix.Mount("tmpfs", a.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700"); err != nil {
			return fmt.Errorf("mount %s: %w", a.dir, err)
		}
	}
	// What is mounted below must not reach containers that Kata sets up later.
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

// Info implements the service.
func (a *Agent) Info(ctx context.Context, r *api.InfoRequest) (*api.InfoResponse, error) {
	out := &api.InfoResponse{Protocol: api.ProtocolVersion, Version: version.Version, KernelRelease: kernelRelease(), BootId: bootID()}
	if r.GetCheck() {
		v, check, err := a.criu.inspect(ctx)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		out.CriuVersion, out.CriuCheck = v, check
		if err != nil {
			out.Problems = append(out.Problems, err.Error())
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
	defer a.ops.lock(id)()
	if c, err := a.running(id); err == nil {
		return &api.AdoptResponse{Pid: int32(c.Init.PID)}, nil //nolint:gosec // a pid
	}
	c, err := find(id)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	// What a container of the same id left behind, should it have had no Forget.
	if err := errors.Join(a.release(id), cgroup.Remove(ctx, filepath.Join(c.Cgroup, restoredCgroup))); err != nil {
		return nil, errclass.ToRPC(err)
	}
	if err := withdraw(c.Init, r.GetExchangeDestination(), r.GetToken(), a.exchangePath(id)); err != nil {
		return nil, errclass.ToRPC(err)
	}
	if err := a.save(c); err != nil {
		return nil, errclass.ToRPC(errors.Join(err, a.release(id)))
	}
	log.G(ctx).WithFields(log.Fields{"container": id, "pid": c.Init.PID, "cgroup": c.Cgroup}).Info("adopted")
	return &api.AdoptResponse{Pid: int32(c.Init.PID)}, nil //nolint:gosec // a pid
}

// Forget implements the service.
func (a *Agent) Forget(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	id := r.GetContainerId()
	if err := checkID(id); err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer a.ops.lock(id)()
	a.hold.thawed(id)
	var spoke error
	if c, err := a.load(id); err == nil {
		spoke = errors.Join(a.speak(c), c.forgetCgroup(ctx))
	}
	err := os.Remove(a.recordPath(id))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err := errors.Join(spoke, err, a.release(id)); err != nil {
		return nil, errclass.ToRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Hold implements the service: it answers when its connection has ended.
func (a *Agent) Hold(ctx context.Context, _ *api.HoldRequest) (*emptypb.Empty, error) {
	a.hold.enter()
	defer a.hold.leave(holdGrace)
	<-ctx.Done()
	return nil, ctx.Err()
}

// Freeze implements the service.
func (a *Agent) Freeze(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	defer a.ops.lock(r.GetContainerId())()
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if err := cgroup.Freeze(ctx, c.tree()); err != nil {
		return nil, errclass.ToRPC(fmt.Errorf("container %s: %w", c.ID, err))
	}
	if err := c.writeOut(ctx); err != nil {
		return nil, errclass.ToRPC(errors.Join(fmt.Errorf("container %s: %w", c.ID, err), cgroup.Thaw(c.tree())))
	}
	a.hold.frozen(c.ID)
	return &emptypb.Empty{}, nil
}

// Thaw implements the service.
func (a *Agent) Thaw(_ context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	defer a.ops.lock(r.GetContainerId())()
	return &emptypb.Empty{}, errclass.ToRPC(a.thaw(r.GetContainerId()))
}

func (a *Agent) thaw(id string) error {
	c, err := a.load(id)
	if err != nil {
		return err
	}
	a.hold.thawed(id)
	if err := errors.Join(a.speak(c), cgroup.Thaw(c.tree())); err != nil {
		return fmt.Errorf("container %s: %w", id, err)
	}
	return nil
}

// thawAll is called when frozen containers have no owner any more.
func (a *Agent) thawAll(ids []string) {
	for _, id := range ids {
		unlock := a.ops.lock(id)
		if err := a.thaw(id); err != nil {
			log.L.WithError(err).WithField("container", id).Warn("thaw a container without an owner")
		} else {
			log.L.WithField("container", id).Warn("thawed: the shim that froze it is gone")
		}
		unlock()
	}
}
