// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// maxMessage is more than any message of CRIU's has bytes.
const maxMessage = 1 << 16

// service is a CRIU that executes one request (criu/cr-service.c). go-criu's
// client is not used: it cannot tell when the restored processes are about to
// run, and leaves the socket to any child that is started at the same time.
type service struct {
	cmd    *exec.Cmd
	socket *os.File
	// exited is closed when CRIU has exited, and status is how.
	exited chan struct{}
	status error
	// guarded: cmd is not CRIU, but the process that has started it (see [launch.Guarded]).
	guarded bool
	// group: CRIU leads a process group, with the child that does its work.
	group bool
	// answered: the response has come, after which CRIU exits on its own.
	answered bool
}

// startService starts "PATH swrk FD" with the calling thread's namespaces, in a
// cgroup, or in the caller's if that is empty, and in a process group of its own
// if so requested. The caller calls close.
func startService(path, cgroup string, group bool) (*service, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	socket, theirs := os.NewFile(uintptr(fds[0]), "criu"), os.NewFile(uintptr(fds[1]), "criu's end")
	defer theirs.Close()
	s := &service{cmd: exec.Command(path, "swrk", fmt.Sprint(launch.ServiceFD)), socket: socket, exited: make(chan struct{}), group: group}
	s.cmd.ExtraFiles = []*os.File{theirs, socket}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: group}
	if cgroup != "" {
		// To move it there later takes an RCU grace period, 10 ms and more.
		dir, err := os.Open(cgroup)
		if err != nil {
			socket.Close()
			return nil, fmt.Errorf("start CRIU: %w", err)
		}
		defer dir.Close()
		s.cmd.SysProcAttr.UseCgroupFD, s.cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := s.cmd.Start(); err != nil {
		socket.Close()
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	go func() {
		defer close(s.exited)
		s.status = s.cmd.Wait()
		// Its children may have the other end of the socket open still. What it
		// has sent can be read nevertheless.
		_ = unix.Shutdown(fds[0], unix.SHUT_RDWR)
	}()
	return s, nil
}

// groupRuns reports whether a process of a group has not exited. The kernel has one
// in the group until its parent has asked for its status.
func groupRuns(leader int) bool {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	return slices.ContainsFunc(dirs, func(dir string) bool {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return false
		}
		if group, err := unix.Getpgid(pid); err != nil || group != leader {
			return false
		}
		st, err := procfs.ReadStat(pid)
		return err == nil && !st.Exited()
	})
}

// pid is CRIU's in the PID namespace of the caller, if it is not guarded.
func (s *service) pid() int { return s.cmd.Process.Pid }

// close waits until CRIU has exited, and returns how. It is killed if it has not
// answered the request.
func (s *service) close() error {
	if !s.answered {
		s.kill()
	}
	<-s.exited
	var left error
	if s.group {
		left = endGroup(s.cmd.Process.Pid)
	}
	return errclass.Join(s.socket.Close(), s.status, left)
}

// groupTimeout bounds the end of a child that has been killed.
const groupTimeout = 5 * time.Second

// endGroup kills what a CRIU that has exited has left in its process group, and
// waits until that has let go of what it dumps.
func endGroup(leader int) error {
	for deadline := time.Now().Add(groupTimeout); ; {
		if err := unix.Kill(-leader, unix.SIGKILL); errors.Is(err, unix.ESRCH) || !groupRuns(leader) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("a child of CRIU, in the process group %d, does not exit", leader)
		}
		timer := time.NewTimer(time.Millisecond)
		<-timer.C
	}
}

// kill kills CRIU, unless it has exited.
func (s *service) kill() {
	sig := os.Kill
	if s.guarded {
		sig = launch.EndSignal
	}
	_ = s.cmd.Process.Signal(sig)
}

// watch calls abandon at the end of ctx, and then kills CRIU, unless the returned
// function was called meanwhile, of which abandon is told.
func (s *service) watch(ctx context.Context, abandon func(done <-chan struct{})) (stop func()) {
	done := make(chan struct{})
	go func() {
		select {
		case <-done:
			return
		case <-ctx.Done():
			abandon(done)
		}
		select {
		case <-done: // it has come to its end
		default:
			s.kill()
		}
	}()
	return func() { close(done) }
}

// call sends the request and returns the response. Before that it calls notify
// with each stage that CRIU reaches, if the request asks for it; CRIU waits
// until notify returns.
func (s *service) call(req *rpc.CriuReq, notify func(stage string) error) (*rpc.CriuResp, error) {
	buf, want := make([]byte, maxMessage), req.GetType()
	for {
		out, err := proto.Marshal(req)
		if err != nil {
			return nil, err
		}
		if _, err := s.socket.Write(out); err != nil {
			return nil, err
		}
		n, err := s.socket.Read(buf)
		if err != nil {
			return nil, err
		}
		resp := &rpc.CriuResp{}
		if err := proto.Unmarshal(buf[:n], resp); err != nil {
			return nil, fmt.Errorf("read the response of CRIU: %w", err)
		}
		s.answered = resp.GetType() != rpc.CriuReqType_NOTIFY
		switch {
		case !resp.GetSuccess():
			return nil, fmt.Errorf("operation failed (msg:%s err:%d)", resp.GetCrErrmsg(), resp.GetCrErrno())
		case resp.GetType() == rpc.CriuReqType_NOTIFY && notify != nil:
			if err := notify(resp.GetNotify().GetScript()); err != nil {
				return nil, err
			}
			req = &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(true)}
		case resp.GetType() != want:
			return nil, fmt.Errorf("CRIU answers %s to %s", resp.GetType(), want)
		default:
			return resp, nil
		}
	}
}
