// SPDX-License-Identifier: Apache-2.0

// Package sockopt brings back those options of IP sockets that CRIU leaves as the
// kernel has them for a new socket: timeouts and limits of TCP, what a datagram
// is received with, path MTU discovery, membership in multicast groups.
//
// What differs from a new socket is read while the processes are frozen before a
// dump, and is set again once they are restored, before they run. Nothing in it
// needs a privilege, so that an image set cannot give more than a program could
// have set itself.
//
// Written against Linux 6.18 and CRIU 4.2 (images/sk-opts.proto).
package sockopt

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// kind is what the options of a new socket depend on.
type kind struct{ domain, sort, protocol int }

// ip reports whether sockets of the kind are of IP.
func (k kind) ip() bool { return k.domain == unix.AF_INET || k.domain == unix.AF_INET6 }

func kindOf(fd int) (k kind, err error) {
	for name, to := range map[int]*int{unix.SO_DOMAIN: &k.domain, unix.SO_TYPE: &k.sort, unix.SO_PROTOCOL: &k.protocol} {
		if *to, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, name); err != nil {
			return k, os.NewSyscallError("getsockopt", err)
		}
	}
	return k, nil
}

// Read returns the options of sockets, each given by one of its descriptors, that
// CRIU does not restore. Sockets that have none are left out. It is called in the
// sockets' network namespace.
func Read(sockets []inspect.Descriptor) (out []*api.Socket, err error) {
	r := &reader{fresh: make(map[kind]map[option]value)}
	for _, d := range sockets {
		err := withSocket(d, func(fd int) error {
			s, err := r.read(fd)
			if err == nil && s != nil {
				s.Pid, s.Fd = int32(d.Inner), int32(d.FD) //nolint:gosec // a PID and a descriptor
				out = append(out, s)
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("read the options of descriptor %d of process %d: %w", d.FD, d.PID, err)
		}
	}
	return out, nil
}

type reader struct {
	// fresh has the options of new sockets.
	fresh map[kind]map[option]value
	// groups are those that anybody in the network namespace has joined, once they
	// are needed.
	groups []group
	listed bool
}

// read returns what differs in a socket; nil: nothing.
func (r *reader) read(fd int) (*api.Socket, error) {
	k, err := kindOf(fd)
	if err != nil || !k.ip() {
		return nil, err
	}
	fresh, ok := r.fresh[k]
	if !ok {
		// Not everybody may make a socket of each kind, nor does the kernel have all
		// that were made before a protocol was disabled.
		if other, err := unix.Socket(k.domain, k.sort|unix.SOCK_CLOEXEC, k.protocol); err == nil {
			fresh = values(other)
			unix.Close(other)
		}
		r.fresh[k] = fresh
	}
	s := &api.Socket{}
	if fresh != nil {
		now := values(fd)
		for _, o := range options {
			if v, ok := now[o]; ok && v != fresh[o] {
				s.Options = append(s.Options, &api.SocketOption{Level: uint32(o.level), Name: uint32(o.name), Value: int32(v.number), Text: v.text}) //nolint:gosec // as setsockopt has them
			}
		}
	}
	if k.sort != unix.SOCK_STREAM {
		if !r.listed {
			if r.groups, err = listGroups(); err != nil {
				return nil, err
			}
			r.listed = true
		}
		if s.Memberships, err = memberships(fd, k.domain, r.groups); err != nil {
			return nil, err
		}
	}
	if len(s.GetOptions())+len(s.GetMemberships()) == 0 {
		return nil, nil
	}
	return s, nil
}

// Restore sets the options of the sockets of restored processes, given as their
// PIDs here by those in the container. It returns what could not be set, each as
// an error that names it.
func Restore(sockets []*api.Socket, processes map[int]int) (failed []error) {
	for _, s := range sockets {
		pid, ok := processes[int(s.GetPid())]
		if !ok {
			failed = append(failed, fmt.Errorf("process %d is not among the restored ones", s.GetPid()))
			continue
		}
		err := withSocket(inspect.Descriptor{PID: pid, FD: int(s.GetFd())}, func(fd int) error { return restore(fd, s) })
		if err != nil {
			failed = append(failed, fmt.Errorf("descriptor %d of process %d in the container: %w", s.GetFd(), s.GetPid(), err))
		}
	}
	return failed
}

func restore(fd int, s *api.Socket) (err error) {
	k, err := kindOf(fd)
	if err != nil {
		return err
	}
	if !k.ip() {
		return errors.New("it is no socket of IP")
	}
	for _, o := range s.GetOptions() {
		known, ok := find(int(o.GetLevel()), int(o.GetName()))
		if !ok {
			err = errclass.Join(err, fmt.Errorf("option %d of level %d is unknown", o.GetName(), o.GetLevel()))
			continue
		}
		want := value{int(o.GetValue()), o.GetText()}
		if have, ok := known.get(fd); ok && have == want {
			continue
		}
		if e := known.set(fd, want); e != nil {
			err = errclass.Join(err, fmt.Errorf("option %s: %w", known.label, e))
		}
	}
	for _, m := range s.GetMemberships() {
		if e := join(fd, m); e != nil {
			err = errclass.Join(err, fmt.Errorf("multicast group %s on %s: %w", m.GetGroup(), m.GetInterface(), e))
		}
	}
	return err
}

func withSocket(d inspect.Descriptor, do func(fd int) error) error {
	process, err := pidfd.Open(d.PID)
	if err != nil {
		return err
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, d.FD, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(fd)
	return do(fd)
}
