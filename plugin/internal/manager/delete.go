// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// containerd gives delete 5 s in all (core/runtime/v2/shim.go, cleanupTimeout).
const (
	retireTimeout = 2 * time.Second
	// shutdownGrace is the time for a shim of Kata's to exit after Shutdown.
	shutdownGrace = 500 * time.Millisecond
	// vmTimeout bounds the wait for the VM, from the beginning of delete.
	vmTimeout = 4 * time.Second
)

// ErrReplaced means that another container has got the name of the one to
// delete.
var ErrReplaced = errors.New("the bundle has been removed, and another container has its name by now")

// Delete cleans up after a shim whose connection to containerd has been closed,
// for whatever reason, and returns the answer for stdout. Errors are logged,
// not returned: delete is best effort and is never retried.
//
// containerd waits for it before it gives the name to another container, but no
// longer than its caller's deadline. As soon as there is another container of
// that name, Delete therefore leaves alone whatever is named after it and
// returns [ErrReplaced]: after any other answer, containerd would also remove
// that container's bundle.
func Delete(ctx context.Context, i *Invocation) ([]byte, error) {
	begin := time.Now()
	if i.replaced() {
		return nil, ErrReplaced
	}
	warn := func(step string, err error) {
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", i.ID).Warn("failed to " + step)
		}
	}
	r, err := bundle.ReadRecord(i.Bundle)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			warn("read record", err)
		}
		if r, err = i.guessRecord(); err != nil {
			return nil, err
		}
	}
	owns := r.Sandbox == i.ID
	if owns {
		warn("kill the daemon", endDaemon(r))
	}
	// A running daemon of ours takes care of Kata's shim and of the container's
	// files. containerd also calls this after every deletion of a container in a
	// pod, when there may already be another one of the same name, whose root file
	// system Kata's delete would unmount. Without our daemon, Kata's has no owner
	// any more, which Kata's own delete does not expect.
	alive := !owns && answers(r.Address)
	if !alive && !i.replaced() {
		warn("protect what Kata shares", ProtectShare(filepath.Join(filepath.Dir(filepath.Clean(i.Bundle)), r.Sandbox), r.Sandbox))
		err := i.retire(ctx, r.Downstream, owns)
		warn("stop Kata's container", err)
		if owns {
			grace := shutdownGrace
			if err != nil {
				grace = 0
			}
			warn("kill Kata's shim", killKata(i.Bundle, grace))
			warn("kill the VM", endVM(i.Bundle, i.ID, begin.Add(vmTimeout)))
		}
	}
	if i.replaced() {
		return nil, ErrReplaced
	}
	resp := &task.DeleteResponse{ExitStatus: 128 + uint32(syscall.SIGKILL), ExitedAt: timestamppb.Now()}
	if !alive {
		resp, err = i.deleteKata(ctx, r)
		warn("run Kata's delete", err)
		if i.replaced() {
			return nil, ErrReplaced
		}
		warn("remove an unfinished image set", bundle.RemoveUnfinished(r.StateDir, i.Namespace, i.ID))
		warn("remove containerd's copy of a checkpoint", removeTemporary(i.Bundle))
		warn("empty the rootfs", bundle.EmptyRootfs(i.Bundle))
		warn("remove the exchange directory", remove.All(adjust.ExchangeDir(r.StateDir, i.Namespace, i.ID)))
		warn("remove a copy of an image set", remove.All(adjust.StagingDir(r.StateDir, i.Namespace, i.ID)))
	}
	if owns {
		warn("remove sockets", i.removeSockets(r))
		warn("remove what Kata leaves", kata.Sweep(i.ID))
	}
	return proto.Marshal(resp)
}

// replaced reports whether the bundle's path leads to another bundle than the
// one that containerd has made the working directory, as it does for every
// delete. A bundle that containerd has removed has the name .ID, or is marked
// as deleted. With any other working directory, this has been started by hand.
func (i *Invocation) replaced() bool {
	own, err := os.Readlink("/proc/self/cwd")
	if err != nil || procfs.WorksIn(os.Getpid(), i.Bundle) {
		return false
	}
	own = strings.TrimSuffix(own, " (deleted)")
	dir, name := filepath.Split(filepath.Clean(i.Bundle))
	if own != filepath.Join(dir, name) && own != filepath.Join(dir, "."+name) {
		return false
	}
	_, err = os.Stat(i.Bundle)
	return err == nil
}

// guessRecord is for a bundle without a record: start has not got so far.
func (i *Invocation) guessRecord() (*bundle.Record, error) {
	cfg, err := config.Load(config.Path())
	if err != nil {
		return nil, err
	}
	r := &bundle.Record{Sandbox: i.ID, DownstreamShim: cfg.DownstreamShim, StateDir: cfg.StateDir}
	if spec, err := bundle.ReadSpec(i.Bundle); err == nil {
		if _, sandbox, err := annotations.Place(i.ID, spec.Annotations); err == nil {
			r.Sandbox = sandbox
		}
	}
	r.Address = "unix://" + i.socketPath(r.Sandbox)
	r.Events = i.socketPath(r.Sandbox) + ".events"
	return r, nil
}

// endDaemon kills our daemon if it is running.
func endDaemon(r *bundle.Record) error {
	return end(r.PID, 0, func() bool { return procfs.Is(r.PID, r.StartTime) })
}

func answers(address string) bool {
	conn, err := net.DialTimeout("unix", strings.TrimPrefix(address, "unix://"), time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// retire kills and deletes a container of a Kata shim without an owner, as an
// engine would, and its sandbox if it holds that.
func (i *Invocation) retire(ctx context.Context, e kata.Endpoint, owns bool) error {
	if e.Address == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, retireTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", e.Path())
	if err != nil {
		return nil // Kata's shim has exited: the usual case
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	call := func(method string, req, resp proto.Message) error {
		return client.Call(ctx, e.Service(), method, req, resp)
	}

	if err := call("Kill", &task.KillRequest{ID: i.ID, Signal: uint32(syscall.SIGKILL), All: true}, &emptypb.Empty{}); err == nil {
		for pause := 5 * time.Millisecond; ; pause *= 2 {
			st := &task.StateResponse{}
			if err := call("State", &task.StateRequest{ID: i.ID}, st); err != nil || st.GetStatus() == tasktypes.Status_STOPPED {
				break
			}
			select {
			case <-time.After(pause):
				continue
			case <-ctx.Done():
			}
			break
		}
	}
	err = call("Delete", &task.DeleteRequest{ID: i.ID}, &task.DeleteResponse{})
	if owns {
		serr := call("Shutdown", &task.ShutdownRequest{ID: i.ID, Now: true}, &emptypb.Empty{})
		if errors.Is(serr, ttrpc.ErrClosed) {
			return nil
		}
		err = errclass.Join(err, serr)
	}
	return err
}

// deleteKata runs `delete` of Kata's binary and returns its answer, or a
// default if it has none: Kata's Rust shim prints its errors and exits with 0.
func (i *Invocation) deleteKata(ctx context.Context, r *bundle.Record) (*task.DeleteResponse, error) {
	resp := &task.DeleteResponse{ExitStatus: 128 + uint32(syscall.SIGKILL), ExitedAt: timestamppb.Now()}
	shim, err := kata.Find(r.DownstreamShim)
	if err != nil {
		return resp, err
	}
	out, err := shim.Run(ctx, kata.Call{Args: i.Args, Stdin: i.Stdin})
	if err != nil {
		return resp, err
	}
	theirs := &task.DeleteResponse{}
	if len(out) == 0 {
		return resp, errors.New("no answer")
	}
	if err := proto.Unmarshal(out, theirs); err != nil {
		return resp, fmt.Errorf("answer of Kata's shim to delete: %w", err)
	}
	return theirs, nil
}

// removeTemporary removes the copy of a checkpoint that a killed daemon had
// been given by containerd.
func removeTemporary(dir string) error {
	path, err := bundle.Temporary(dir)
	if err != nil || path == "" {
		return err
	}
	return bundle.RemoveTemporary(path)
}

// removeSockets removes what belongs to the sandbox as a whole.
func (i *Invocation) removeSockets(r *bundle.Record) error {
	var errs []error
	paths := []string{strings.TrimPrefix(r.Address, "unix://"), r.Events}
	if r.Downstream.Address != "" {
		// Kata's Rust shim starts none where there is one (shim/src/shim_start.rs).
		paths = append(paths, r.Downstream.Path())
	}
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	left, err := filepath.Glob(bundle.BootstrapGlob(r.StateDir, i.Namespace, i.ID))
	errs = append(errs, err)
	for _, dir := range left {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errclass.Join(errs...)
}
