package agent

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/connections"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// tcpConnections lists a container's open TCP connections, and refuses those
// that nobody has said anything about: a restore brings them back only to the
// same address, and only while their peers still have them.
func tcpConnections(c *container, o *api.CheckpointOptions) ([]connections.Connection, error) {
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil {
		return nil, fmt.Errorf("processes of container %s: %w", c.ID, err)
	}
	list, err := connections.List(pids)
	if err != nil {
		return nil, fmt.Errorf("TCP connections of container %s: %w", c.ID, err)
	}
	if len(list) == 0 || o.GetTcpEstablished() || o.GetTcpClose() {
		return list, nil
	}
	more := ""
	if len(list) > 1 {
		more = fmt.Sprintf(", and there are %d more", len(list)-1)
	}
	return nil, errclass.Precondition("the process %s has an open TCP connection from %s to %s%s: annotate the container with kata-checkpoint.dev/tcp: "+
		"established to keep connections or close to close them, have the engine send open_tcp, or close them before the checkpoint",
		named(list[0].PID), list[0].Local, list[0].Remote, more)
}

// lockName names a container's lock among nftables' tables.
func lockName(id string) string { return "kata-checkpoint-" + id }

// silence cuts a container's TCP connections off: from now on nothing that
// happens here, not even the end of the container, reaches a peer, nor is
// anything that a peer sends acknowledged. It comes before a dump.
func (a *Agent) silence(c *container, list []connections.Connection) error {
	if len(list) == 0 {
		return nil
	}
	// Noted first: whatever comes then, Thaw and Forget undo it.
	c.Silent = true
	if err := a.save(c); err != nil {
		return err
	}
	return netlock.Lock(lockName(c.ID), list)
}

// abandonConnections has the kernel drop the sockets of a silent container
// without a farewell when their process ends. Else it would go on sending one
// to the peers for minutes, and keep the addresses of the connections. It
// comes after a dump: CRIU itself changes the sockets back at its end.
func abandonConnections(list []connections.Connection) error {
	return repair(list, unix.TCP_REPAIR_ON)
}

// speak undoes silence. The processes are still frozen, or gone.
func (a *Agent) speak(c *container) error {
	if !c.Silent {
		return nil
	}
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("processes of the container: %w", err)
	}
	list, err := connections.List(pids)
	if err != nil {
		return err
	}
	if err := errors.Join(repair(list, unix.TCP_REPAIR_OFF_NO_WP), netlock.Unlock(lockName(c.ID))); err != nil {
		return err
	}
	c.Silent = false
	return a.save(c)
}

// repair sets sockets' repair mode, in which they are closed without a packet
// (net/ipv4/tcp.c, __tcp_close).
func repair(list []connections.Connection, mode int) error {
	for _, c := range list {
		if err := setRepair(c, mode); err != nil {
			return fmt.Errorf("the TCP connection from %s to %s: %w", c.Local, c.Remote, err)
		}
	}
	return nil
}

func setRepair(c connections.Connection, mode int) error {
	process, err := unix.PidfdOpen(c.PID, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, c.FD, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(fd)
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, mode))
}
