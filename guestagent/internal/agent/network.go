// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// lockName is the name of a container's network lock.
func lockName(id string) string { return "kata-checkpoint-" + id }

// keepsConnections reports whether the open TCP connections of a container go into
// its image set.
func keepsConnections(list []inspect.Connection, o *api.CheckpointOptions) bool {
	// Others than those inside have been refused where nothing is said about them.
	return !o.GetTcpClose() && (o.GetTcpEstablished() || len(list) > 0)
}

// lockNetwork locks connections: until unlocked, nothing that happens here, not
// even the end of the container, reaches a peer, nor is anything that a peer sends
// acknowledged. It notes first that connections may be locked, by the agent or by
// CRIU, and their sockets in repair mode: whatever comes then, Thaw and Forget undo
// it.
func (a *Agent) lockNetwork(c *container, list []inspect.Connection) error {
	c.NetworkLocked = true
	if err := a.save(c); err != nil || len(list) == 0 {
		return err
	}
	return netlock.Lock(lockName(c.ID), list)
}

// lockRestored locks the connections that CRIU is about to restore, those with both
// ends in the container as well: what reaches a connection that is half restored
// is answered with a reset, or gets into the wrong place of the stream, and what
// one end sends before the other is there resets both. It reports whether there
// are any. After a failed restore the lock stays, until Forget.
func (a *Agent) lockRestored(c *container, r *api.RestoreRequest, images string) (bool, error) {
	if r.GetOptions().GetTcpClose() {
		return false, nil // their sockets come back unconnected
	}
	list, keepAlive, err := restoredConnections(images)
	if err != nil || len(list) == 0 {
		return false, err
	}
	c.KeepAlive = keepAlive
	return true, a.lockNetwork(c, list)
}

// restoredConnections lists the TCP connections in CRIU's images, each end that is
// there once, with the addresses that CRIU is going to use. It disables their
// keepalive in the images, and returns where it was enabled.
func restoredConnections(images string) (out []inspect.Connection, keepAlive []netlock.Endpoints, err error) {
	seen := make(map[endpoints]bool)
	err = editImage(filepath.Join(images, filesImage), func(f *fdinfo.FileEntry) bool {
		s := f.GetIsk()
		e, ok := endpointsOf(s)
		if !ok || s.GetProto() != unix.IPPROTO_TCP || e.remote.Port() == 0 || seen[e] {
			return false
		}
		seen[e] = true
		out = append(out, inspect.Connection{Local: e.local, Remote: e.remote})
		if !s.GetOpts().GetSoKeepalive() {
			return false
		}
		s.Opts.SoKeepalive = proto.Bool(false)
		keepAlive = append(keepAlive, netlock.Endpoints{Local: e.local, Remote: e.remote})
		return true
	})
	return out, keepAlive, err
}

// enableKeepAlive enables the keepalive of a socket in an image if it is one of
// some connections, and reports whether it is.
func enableKeepAlive(s *sk_inet.InetSkEntry, some []netlock.Endpoints) bool {
	if len(some) == 0 || s.GetProto() != unix.IPPROTO_TCP || s.GetDstPort() == 0 || s.GetOpts() == nil {
		return false
	}
	e, ok := endpointsOf(s)
	if !ok || !slices.Contains(some, netlock.Endpoints{Local: e.local, Remote: e.remote}) {
		return false
	}
	s.Opts.SoKeepalive = proto.Bool(true)
	return true
}

// endpoints are those of a connection, as they are on the wire.
type endpoints struct{ local, remote netip.AddrPort }

// endpointsOf are those of a socket in an image. The other end of one that is not
// connected has the port 0.
func endpointsOf(s *sk_inet.InetSkEntry) (e endpoints, ok bool) {
	src, ok := fromImage(s.GetFamily(), s.GetSrcAddr())
	if !ok {
		return e, false
	}
	dst, ok := fromImage(s.GetFamily(), s.GetDstAddr())
	if !ok {
		return e, false
	}
	return endpoints{netip.AddrPortFrom(src.Unmap(), uint16(s.GetSrcPort())), netip.AddrPortFrom(dst.Unmap(), uint16(s.GetDstPort()))}, true //nolint:gosec // ports
}

// unlockNetwork undoes lockNetwork, of whose connections the processes are still
// frozen, or gone.
func (a *Agent) unlockNetwork(ctx context.Context, c *container) error {
	if !c.NetworkLocked {
		return nil
	}
	list, err := openConnections(ctx, c.tree())
	if err != nil {
		return err
	}
	if err := errclass.Join(netlock.LeaveRepair(list), netlock.Unlock(lockName(c.ID)), netlock.SetKeepAlive(list, c.KeepAlive, true)); err != nil {
		return err
	}
	return a.noteUnlocked(c)
}

// unlockRestored undoes lockRestored once the processes are restored, which are
// frozen, in the cgroup tree.
func (a *Agent) unlockRestored(ctx context.Context, c *container, tree string) error {
	if err := netlock.Unlock(lockName(c.ID)); err != nil {
		return err
	}
	if len(c.KeepAlive) > 0 {
		list, err := openConnections(ctx, tree)
		if err != nil {
			return err
		}
		if err := netlock.SetKeepAlive(list, c.KeepAlive, true); err != nil {
			return err
		}
	}
	return a.noteUnlocked(c)
}

// openConnections lists the connections of the processes in a cgroup, if there
// are any.
func openConnections(ctx context.Context, tree string) ([]inspect.Connection, error) {
	pids, err := cgroup.Procs(tree, true)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list the processes of the container: %w", err)
	}
	processes, err := inspect.Processes(ctx, pids)
	if err != nil {
		return nil, err
	}
	return inspect.Connections(processes)
}

func (a *Agent) noteUnlocked(c *container) error {
	c.NetworkLocked, c.KeepAlive = false, nil
	return a.save(c)
}

// removeCRIULock removes the network lock of a dump whose CRIU has died.
func removeCRIULock(op *criu.Op) error {
	run := criu.RunID(op.LogPath())
	if run == "" {
		return nil // it died before it locked anything
	}
	return netlock.RemoveStale(run)
}

// connectionsOf are those of a message.
func connectionsOf(list []*api.Connection) ([]inspect.Connection, error) {
	out := make([]inspect.Connection, 0, len(list))
	for _, c := range list {
		local, lerr := netip.ParseAddrPort(c.GetLocal())
		remote, rerr := netip.ParseAddrPort(c.GetRemote())
		if err := errclass.Join(lerr, rerr); err != nil {
			return nil, errclass.Invalid(errcode.BadAgentRequest, "TCP connection from %q to %q: %w", c.GetLocal(), c.GetRemote(), err)
		}
		out = append(out, inspect.Connection{Local: local, Remote: remote})
	}
	return out, nil
}

func socketsOf(list []inspect.Connection) []launch.Socket {
	out := make([]launch.Socket, 0, len(list))
	for _, c := range list {
		out = append(out, launch.Socket{PID: c.PID, FD: c.FD})
	}
	return out
}

func connectionMessages(list []inspect.Connection) []*api.Connection {
	out := make([]*api.Connection, 0, len(list))
	for _, c := range list {
		out = append(out, &api.Connection{Local: c.Local.String(), Remote: c.Remote.String()})
	}
	return out
}
