// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// behaviourEnv is how this program behaves as a CRIU.
const behaviourEnv = "KATA_CHECKPOINT_TEST_CRIU"

// guardEnv has this program start a CRIU as a guard.
const guardEnv = "KATA_CHECKPOINT_TEST_GUARD"

// isLaunch reports whether this program was started as CRIU is.
func isLaunch() bool { return len(os.Args) == 3 && os.Args[1] == "swrk" }

func TestMain(m *testing.M) {
	if os.Getenv(guardEnv) != "" && isLaunch() {
		self, err := os.Executable()
		if err == nil {
			runtime.LockOSThread()
			err = launch.Guarded(self, os.Args, []string{behaviourEnv + "=" + os.Getenv(behaviourEnv)}, nil)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if behaviour := os.Getenv(behaviourEnv); behaviour != "" && isLaunch() {
		if os.Args[2] != "3" {
			os.Exit(2)
		}
		os.Exit(imitate(os.NewFile(3, "socket"), behaviour))
	}
	os.Exit(m.Run())
}

// imitate serves a restore as CRIU does (criu/cr-service.c, send_criu_rpc_script).
func imitate(socket *os.File, behaviour string) int {
	buf := make([]byte, maxMessage)
	receive := func() *rpc.CriuReq {
		n, err := socket.Read(buf)
		req := &rpc.CriuReq{}
		if err != nil || proto.Unmarshal(buf[:n], req) != nil {
			return nil
		}
		return req
	}
	send := func(resp *rpc.CriuResp) {
		data, err := proto.Marshal(resp)
		if err == nil {
			_, _ = socket.Write(data)
		}
	}
	req := receive()
	if req.GetType() != rpc.CriuReqType_RESTORE || !req.GetOpts().GetNotifyScripts() {
		return 3
	}
	if behaviour == "hangs" {
		receive()
	}
	for _, stage := range []string{"pre-restore", "post-restore", "pre-resume", "post-resume"} {
		send(&rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true), Notify: &rpc.CriuNotify{Script: &stage}})
		if answer := receive(); answer.GetType() != rpc.CriuReqType_NOTIFY || !answer.GetNotifySuccess() {
			return 4 // and CRIU lets the processes run
		}
		if behaviour == "dies" && stage == "post-restore" {
			return 5
		}
	}
	if behaviour == "orphans the socket" {
		// A process that it has restored keeps it open.
		if _, err := os.StartProcess("/bin/sleep", []string{"sleep", "2"}, &os.ProcAttr{Files: []*os.File{nil, nil, nil, socket}}); err != nil {
			return 6
		}
		return 7
	}
	send(&rpc.CriuResp{Type: rpc.CriuReqType_RESTORE.Enum(), Success: proto.Bool(behaviour != "fails")})
	return 0
}

func startImitation(t *testing.T, behaviour string) *service {
	t.Helper()
	t.Setenv(behaviourEnv, behaviour)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s, err := startService(self, "", false)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func restoreRequest() *rpc.CriuReq {
	return &rpc.CriuReq{Type: rpc.CriuReqType_RESTORE.Enum(), Opts: &rpc.CriuOpts{ImagesDirFd: proto.Int32(-1), NotifyScripts: proto.Bool(true)}}
}

// A CRIU that nobody wants any longer is killed, once what it has restored is.
func TestACRIUEndsWithItsContext(t *testing.T) {
	for name, isGuarded := range map[string]bool{"alone": false, "guarded": true} {
		t.Run(name, func(t *testing.T) { endsWithItsContext(t, isGuarded) })
	}
}

func endsWithItsContext(t *testing.T, isGuarded bool) {
	if isGuarded {
		t.Setenv(guardEnv, "1")
	}
	s := startImitation(t, "hangs")
	s.guarded = isGuarded
	ctx, cancel := context.WithCancel(t.Context())
	abandoned := false
	stop := s.watch(ctx, func(<-chan struct{}) {
		abandoned = true
		select {
		case <-s.exited:
			t.Error("it was killed first")
		default:
		}
	})
	go func() {
		defer cancel()
		// A guard starts it once it can kill it.
		for begun := false; !begun; {
			children, err := procfs.Children(s.cmd.Process.Pid)
			begun = !s.guarded || err != nil || len(children) > 0
			select {
			case <-time.After(10 * time.Millisecond):
			case <-s.exited:
				return
			}
		}
	}()
	_, err := s.call(restoreRequest(), func(string) error { return nil })
	<-s.exited
	stop()
	if err == nil || !abandoned {
		t.Errorf("error %v, abandoned %v", err, abandoned)
	}
	if err := s.close(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("it has exited with: %v", err)
	}
}

// A dump that comes to its end in time is left alone.
func TestADumpThatEndsIsNotKilled(t *testing.T) {
	s := startImitation(t, "works")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	stop := s.watch(ctx, waitGrace)
	_, err := s.call(restoreRequest(), func(string) error { return nil })
	stop()
	if err != nil || s.close() != nil {
		t.Errorf("error %v, exited with %v", err, s.status)
	}
}

func TestStages(t *testing.T) {
	own := errors.New("no")
	for behaviour, tc := range map[string]struct {
		refuse string
		stages int
		err    func(error) bool
	}{
		"succeeds":           {"", 4, func(err error) bool { return err == nil }},
		"fails":              {"", 4, func(err error) bool { return err != nil && err.Error() == "operation failed (msg: err:0)" }},
		"dies":               {"", 2, func(err error) bool { return errors.Is(err, io.EOF) }},
		"orphans the socket": {"", 4, func(err error) bool { return errors.Is(err, io.EOF) }},
		"is refused":         {"pre-resume", 3, func(err error) bool { return errors.Is(err, own) }},
	} {
		t.Run(behaviour, func(t *testing.T) {
			s := startImitation(t, behaviour)
			var stages []string
			_, err := s.call(restoreRequest(), func(stage string) error {
				stages = append(stages, stage)
				if stage == tc.refuse {
					return own
				}
				return nil
			})
			if !tc.err(err) {
				t.Errorf("error %v", err)
			}
			if want := []string{"pre-restore", "post-restore", "pre-resume", "post-resume"}[:tc.stages]; !slices.Equal(stages, want) {
				t.Errorf("stages %q", stages)
			}
			_ = s.close()
			if !s.cmd.ProcessState.Exited() && behaviour != "is refused" {
				t.Errorf("it has not exited on its own: %s", s.cmd.ProcessState)
			}
		})
	}
}

// A CRIU whose agent has died waits at the stage: it would let the processes run
// that nobody has looked at.
func TestWhoseAgentHasDiedWaits(t *testing.T) {
	s := startImitation(t, "succeeds")
	_, err := s.call(restoreRequest(), func(stage string) error {
		if stage != "pre-resume" {
			return nil
		}
		if err := s.socket.Close(); err != nil { // as the kernel does for a process that dies
			t.Fatal(err)
		}
		select {
		case <-s.exited:
			t.Error("it has not waited")
		case <-time.After(300 * time.Millisecond):
		}
		return unix.ECANCELED
	})
	if !errors.Is(err, unix.ECANCELED) {
		t.Errorf("error %v", err)
	}
	_ = s.close()
}

// A guard exits as its CRIU has, and the response comes through to the agent.
func TestAGuardExitsAsItsCRIU(t *testing.T) {
	t.Setenv(guardEnv, "1")
	for behaviour, status := range map[string]int{"succeeds": 0, "dies": 5} {
		s := startImitation(t, behaviour)
		s.guarded = true
		_, err := s.call(restoreRequest(), func(string) error { return nil })
		<-s.exited
		_ = s.close()
		if (err == nil) != (status == 0) || s.cmd.ProcessState.ExitCode() != status {
			t.Errorf("it %s: error %v, %s", behaviour, err, s.cmd.ProcessState)
		}
	}
}

// A CRIU that is killed does not leave the child that does its work.
func TestEndGroup(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := endGroup(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child)); err == nil && !strings.Contains(string(data), ") Z ") {
		t.Errorf("the child is there: %s", data)
	}
	if err := endGroup(cmd.Process.Pid); err != nil {
		t.Errorf("of no processes: %v", err)
	}
}
