// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/exechelper"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/outcome"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/sockopt"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// cleanupTimeout bounds the kill of what a failed restore has left running.
const cleanupTimeout = 10 * time.Second

// CheckRestore implements the service.
func (a *Agent) CheckRestore(ctx context.Context, r *api.RestoreRequest) (*emptypb.Empty, error) {
	_, end, err := a.ops.begin(ctx, r.GetContainerId(), change)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	err = checkRequest(r)
	if err == nil {
		err = a.checkRestore(c, r)
	}
	if err != nil {
		return nil, errclass.ToRPC(c.explain(errclass.Precondition(errcode.RestoreFailed, "container %s cannot be restored: %w", c.ID, err)))
	}
	return &emptypb.Empty{}, nil
}

func (a *Agent) checkRestore(c *container, r *api.RestoreRequest) error {
	own, err := inspect.OwnPIDNamespace(c.Init.PID)
	if err != nil {
		return err
	}
	if !own { // the placeholder would not reap the restored root
		return errcode.Placeholder.Wrap(errors.New("its placeholder has no PID namespace of its own, which the shim requests from Kata: install the guest bundle and the shim of the same release"))
	}
	images, err := a.inExchange(c.ID, r.GetDirectory())
	if err != nil {
		return err
	}
	for _, name := range []string{imageset.InventoryName, imageset.DevShmName} {
		if _, err := os.Lstat(filepath.Join(images, name)); err != nil {
			return errcode.ExchangeLost.Errorf("the image set is not visible in the guest: %w", err)
		}
	}
	if err := checkContents(images); err != nil {
		return err
	}
	addresses, err := readdress(r)
	if err != nil {
		return err
	}
	if err := addresses.check(images); err != nil {
		return err
	}
	version, err := a.criu.version()
	if err != nil {
		return err
	}
	if version/10000 < r.GetCriuVersion()/10000 {
		return errcode.OlderCRIU.Errorf("the checkpoint was made by CRIU %s and the guest has %s: install a guest bundle that is at least as new",
			criu.FormatVersion(r.GetCriuVersion()), criu.FormatVersion(version))
	}
	have, err := cpuFeatures()
	if err != nil {
		return err
	}
	if lost := missing(r.GetCpuFeatures(), have); len(lost) > 0 {
		return errcode.Processor.Errorf("the checkpoint was made on a processor with %s, which the processor of this guest lacks: restore it on a machine with the same or a newer processor", strings.Join(lost, ", "))
	}
	mounts, err := inspect.Mounts(c.Init.PID)
	if err != nil {
		return err
	}
	there := make([]string, 0, len(mounts))
	for _, m := range mounts {
		there = append(there, m.Mountpoint)
	}
	var want []string
	for _, e := range r.GetExternals() {
		if !e.GetDevice() {
			want = append(want, e.GetDestination())
		}
	}
	if lost := missing(want, there); len(lost) > 0 {
		return errcode.MountsLacking.Errorf("the new container has no mount at %s: create it with the mounts of the old one", strings.Join(lost, ", "))
	}
	tree, err := inspect.Tree(c.Init.PID, c.Mounts)
	if err != nil {
		return err
	}
	defer tree.Close()
	if err := checkMountPoints(images, tree); err != nil {
		return err
	}
	return c.checkOpenFiles(tree, r.GetOpenFiles())
}

// checkOpenFiles refuses an image set with open files that differ now.
func (c *container) checkOpenFiles(tree *inside.Tree, files []*api.OpenFile) error {
	changed, err := inspect.ChangedFiles(tree, files)
	if err != nil {
		return err
	}
	if len(changed) > 0 {
		return errcode.FilesChanged.Errorf("files that its processes have open have changed since the checkpoint: %s: put them back as they were", strings.Join(changed, ", "))
	}
	shm, err := c.openShm(c.Init.PID)
	if err != nil || shm == nil {
		return err
	}
	defer shm.Close()
	changed, err = inspect.ChangedShm(int(shm.Fd()), files)
	if err != nil {
		return err
	}
	if len(changed) > 0 {
		return errcode.SharedMemoryUsed.Errorf("files that its processes have open differ in the pod's /dev/shm from those at the checkpoint: %s: remove them, or restore it in another pod", strings.Join(changed, ", "))
	}
	return nil
}

// Restore implements the service.
func (a *Agent) Restore(ctx context.Context, r *api.RestoreRequest) (*api.RestoreResponse, error) {
	ctx, end, err := a.ops.begin(ctx, r.GetContainerId(), change)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if c.Restored != nil {
		return nil, errclass.ToRPC(errclass.Precondition(errcode.AlreadyRestored, "container %s has already been restored", c.ID))
	}
	out, err := a.restore(ctx, c, r)
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		if err = c.explain(err); cgroup.OOMKills(c.Cgroup) > 0 {
			err = fmt.Errorf("the container may use less memory than its processes need: restore it into one with a higher memory limit (%w)", err)
		}
		err = errclass.Join(err, cgroup.Remove(ctx, filepath.Join(c.Cgroup, restoredCgroup)))
		return nil, errclass.ToRPC(err)
	}
	return out, nil
}

func (a *Agent) restore(ctx context.Context, c *container, r *api.RestoreRequest) (*api.RestoreResponse, error) {
	ph := newPhases(ctx, "restore", c.ID)
	// CheckRestore is another call.
	if err := checkRequest(r); err != nil {
		return nil, err
	}
	images, err := a.inExchange(c.ID, r.GetDirectory())
	if err != nil {
		return nil, err
	}
	if err := checkContents(images); err != nil {
		return nil, err
	}
	if err := waitPlaceholder(ctx, c.Init); err != nil {
		return nil, err
	}
	ph.done("wait for the placeholder")
	shm, err := c.openShm(c.Init.PID)
	if err != nil {
		return nil, fmt.Errorf("restore /dev/shm: %w", err)
	}
	if shm != nil {
		defer shm.Close()
		if err := restoreShm(ctx, shm, filepath.Join(images, imageset.DevShmName)); err != nil {
			return nil, err
		}
	}
	ph.done("restore /dev/shm")

	addresses, err := readdress(r)
	if err != nil {
		return nil, err
	}
	if n, err := addresses.apply(images); err != nil {
		return nil, err
	} else if n > 0 {
		log.G(ctx).WithFields(log.Fields{"container": c.ID, "sockets": n}).Info("sockets move to the addresses of this guest")
	}
	ph.done("readdress sockets")

	if c.Helper, err = exechelper.Mount(c.Init.PID); err != nil {
		return nil, err
	}
	ph.done("mount the exec helper")

	tree := filepath.Join(c.Cgroup, restoredCgroup)
	if err := os.Mkdir(tree, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	// CRIU joins the placeholder's namespaces. Others it would create from the
	// guest's root namespaces, or as the image set's old pod had them.
	pids, err := procfs.NSPIDs(c.Init.PID)
	if err != nil {
		return nil, err
	}
	job := launch.Job{Target: c.Init.PID, TargetInside: pids[len(pids)-1], Join: []string{"ipc", "uts"}, Cgroup: tree}
	op, err := criu.NewOp(filepath.Join(a.dir, "ops"), job, c.Init.PID)
	if err != nil {
		return nil, err
	}
	defer op.Close()
	opts := restoreOptions(op, r, images)
	shared, err := sharedNamespace(images)
	if err != nil {
		return nil, err
	}
	if shared {
		first, err := a.makeNamespace(ctx, c)
		if err != nil {
			return nil, err
		}
		opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: proto.String(criu.PIDNamespaceKey), Fd: proto.Int32(op.InheritPIDNamespace(first))})
		taken, err := imagePIDs(images)
		if err != nil {
			return nil, err
		}
		op.Avoid(taken)
		ph.done("make a PID namespace")
	}
	locked, err := a.lockRestored(c, r, images)
	if err != nil {
		return nil, err
	}
	// Meanwhile.
	may := readAllowed(c.Init.PID, r.GetRights())
	forbidPing, err := allowPing(images)
	if err != nil {
		return nil, err
	}
	err = restoreFrozen(ctx, op, opts, tree)
	err = errclass.Join(err, forbidPing())
	if err != nil {
		if e := copyOut(op.LogPath(), images+api.LogSuffix); e != nil && !errors.Is(e, fs.ErrNotExist) {
			log.G(ctx).WithField("container", c.ID).WithError(e).Warn("failed to copy CRIU's log")
		}
		return nil, err
	}
	ph.done("criu restore")
	if err := checkRestored(may, tree); err != nil {
		return nil, err
	}
	ph.done("check the restored processes")
	if locked {
		if err := a.unlockRestored(ctx, c, tree); err != nil {
			return nil, err
		}
	}

	if err := relockFiles(ctx, c, images, tree); err != nil {
		return nil, err
	}
	if err := applyAttributes(ctx, c, r, tree); err != nil {
		return nil, err
	}
	if len(r.GetSockets()) > 0 {
		if err := restoreSockets(ctx, c, r.GetSockets(), tree); err != nil {
			return nil, err
		}
		ph.done("restore the options of sockets")
	}

	if err := a.letRun(ctx, c, tree); err != nil {
		return nil, err
	}
	return &api.RestoreResponse{Pid: int32(c.Restored.PID), Phases: ph.list}, nil //nolint:gosec // a pid
}

// letRun lets restored processes run, unless the restore was given up meanwhile:
// who did so believes that there are none, and may restore them elsewhere.
func (a *Agent) letRun(ctx context.Context, c *container, tree string) (err error) {
	if c.Restored, err = restoredRoot(tree, c.Init.PID); err != nil {
		return err
	}
	if err = a.save(c); err == nil {
		var thawed error
		err = errclass.Join(a.ops.complete(ctx, func() { thawed = cgroup.Thaw(tree) }), thawed)
	}
	if err != nil {
		c.Restored = nil
		err = errclass.Join(err, a.save(c))
	}
	return err
}

// restoreSockets sets the options of the restored processes' sockets that CRIU
// has left out. What this guest lacks, such as a congestion control, is logged.
func restoreSockets(ctx context.Context, c *container, sockets []*api.Socket, tree string) error {
	pids, err := cgroup.Procs(tree, true)
	if err != nil {
		return fmt.Errorf("list the restored processes: %w", err)
	}
	processes := make(map[int]int, len(pids))
	for _, pid := range pids {
		inner, err := procfs.NSPIDs(pid)
		if err != nil {
			return err
		}
		processes[inner[len(inner)-1]] = pid
	}
	for _, err := range sockopt.Restore(sockets, processes) {
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("a socket does not have all of its options")
	}
	return nil
}

// restoreFrozen has CRIU restore the processes. They are frozen, and have not
// executed an instruction. If it fails, they have been killed.
func restoreFrozen(ctx context.Context, op *criu.Op, opts *rpc.CriuOpts, tree string) error {
	own, err := cgroup.Own()
	if err != nil {
		return err
	}
	hold := func() error {
		err := cgroup.Hold(ctx, tree)
		if err != nil {
			err = errclass.Join(err, killTree(ctx, tree))
		}
		return err
	}
	err = op.Restore(ctx, opts, criu.Stages{
		// CRIU must not be frozen with them, nor killed in place of them when they
		// use too much memory: what it traces would run.
		Created: func(pid int) error { return cgroup.Move(pid, own) },
		// CRIU's option to leave them stopped would be noticed: a parent is told of
		// SIGSTOP, and a process of the SIGCONT that ends it.
		Restored:  hold,
		Abandoned: func() { _ = killTree(ctx, tree) },
	})
	if err != nil {
		return err
	}
	// A thread that CRIU lets go passes from one stop to the other.
	return hold()
}

// killTree kills the processes of a cgroup, even if ctx has ended.
func killTree(ctx context.Context, tree string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	return cgroup.Kill(ctx, tree)
}

// readAllowed begins to read what the processes of a container may have, and
// returns what waits for it.
func readAllowed(placeholder int, rights *api.Rights) func() (*outcome.Container, error) {
	var may *outcome.Container
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		may, err = outcome.Read(placeholder, rights)
	}()
	return func() (*outcome.Container, error) {
		<-done
		return may, err
	}
}

// checkRestored checks that frozen processes have nothing that the container may
// not have.
func checkRestored(read func() (*outcome.Container, error), tree string) error {
	may, err := read()
	if err != nil {
		return err
	}
	pids, err := cgroup.Procs(tree, true)
	if err != nil {
		return fmt.Errorf("list the restored processes: %w", err)
	}
	return may.Check(pids)
}

func restoreOptions(op *criu.Op, r *api.RestoreRequest, images string) *rpc.CriuOpts {
	opts := op.Options(images)
	opts.Root = proto.String(op.AddMount("/", false))
	applyOptions(opts, r.GetOptions())
	for i, e := range r.GetExternals() {
		at := op.AddMount(e.GetDestination(), e.GetDevice())
		opts.External = append(opts.External, fmt.Sprintf("mnt[%s]:%s", imageset.ExternalName(i), at))
	}
	done := make(map[string]bool)
	for _, s := range r.GetStdio() {
		// A terminal is one file with three descriptors, and one entry for
		// CRIU.
		if key := s.GetKey(); key != "" && !done[key] {
			done[key] = true
			opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: proto.String(key), Fd: proto.Int32(op.Inherit(int(s.GetFd())))})
		}
	}
	return opts
}

// waitPlaceholder waits until Kata's init has become the placeholder: Kata's
// Start returns before init has called execve.
func waitPlaceholder(ctx context.Context, init process) error {
	for {
		if !init.alive() {
			return errcode.Placeholder.Wrap(errors.New("the placeholder has exited"))
		}
		if args, err := procfs.Cmdline(init.PID); err == nil && isPlaceholder(args) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errcode.Placeholder.Errorf("the placeholder has not started: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func isPlaceholder(args []string) bool {
	return len(args) == 2 && args[1] == api.PlaceholderMode
}

// restoredRoot finds the root of a restored tree: its parent, CRIU, has exited,
// and it has become the placeholder's child.
func restoredRoot(tree string, placeholder int) (*process, error) {
	pids, err := cgroup.Procs(tree, false)
	if err != nil {
		return nil, fmt.Errorf("list the restored processes: %w", err)
	}
	for _, pid := range pids {
		if stat, err := procfs.ReadStat(pid); err != nil || stat.Parent != placeholder {
			continue
		}
		if root, err := newProcess(pid); err == nil {
			return &root, nil
		}
	}
	return nil, errcode.RestoreFailed.Wrap(errors.New("the restored process has already exited"))
}

// missing returns the elements of want that are not in have.
func missing(want, have []string) []string {
	var out []string
	for _, w := range want {
		if !slices.Contains(have, w) {
			out = append(out, w)
		}
	}
	return out
}
