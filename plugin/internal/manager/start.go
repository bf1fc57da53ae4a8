// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/sys"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// Descriptors that the daemon inherits.
const (
	TaskFD   = 3
	EventsFD = 4
	// ReadyFD receives "ok" once the daemon serves, or an error.
	ReadyFD = 5
)

// readyTimeout bounds the daemon's start.
const readyTimeout = 20 * time.Second

// EventsEnv is the environment variable with the address of containerd's events
// socket.
const EventsEnv = "TTRPC_ADDRESS"

// answer is what containerd reads from start's stdout: JSON, which all releases
// of 2.x accept (core/runtime/v2/shim.go, parseStartResponse).
type answer struct {
	Version  int    `json:"version"`
	Address  string `json:"address"`
	Protocol string `json:"protocol"`
}

// Start starts Kata's shim and our daemon for a sandbox, and returns the answer
// for stdout. For a container in an existing sandbox, the answer is the
// sandbox's. It leaves no process behind after an error.
func Start(ctx context.Context, i *Invocation) ([]byte, error) {
	cfg, err := config.Load(config.Path())
	if err != nil {
		return nil, err
	}
	spec, err := bundle.ReadSpec(i.Bundle)
	if err != nil {
		return nil, err
	}
	kind, sandbox, err := annotations.Place(i.ID, spec.Annotations)
	if err != nil {
		return nil, err
	}
	shim, err := kata.Find(cfg.DownstreamShim)
	if err != nil {
		return nil, err
	}
	socket := i.socketPath(sandbox)
	r := &bundle.Record{
		Sandbox: sandbox, DownstreamShim: shim.Path, StateDir: cfg.StateDir,
		Address: "unix://" + socket, Events: socket + ".events",
	}
	if kind == annotations.InPod {
		err = i.join(ctx, shim, r)
	} else {
		err = i.found(ctx, shim, r)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(answer{Version: 2, Address: r.Address, Protocol: "ttrpc"})
}

// join prepares a container in an existing sandbox.
func (i *Invocation) join(ctx context.Context, shim kata.Binary, r *bundle.Record) error {
	e, err := i.startKata(ctx, shim, "")
	if err != nil {
		return err
	}
	r.Downstream = e
	return r.Write(i.Bundle)
}

// found starts both daemons.
func (i *Invocation) found(ctx context.Context, shim kata.Binary, r *bundle.Record) (err error) {
	socket := strings.TrimPrefix(r.Address, "unix://")
	tasks, err := listen(socket)
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, tasks.Close(), unlinkIf(err != nil, socket)) }()
	// Before Kata's shim: the Rust one connects to it when it starts.
	events, err := listen(r.Events)
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, events.Close(), unlinkIf(err != nil, r.Events)) }()

	defer func() {
		if err != nil {
			err = errclass.Join(err, i.stopKata(r.Downstream), bundle.RemoveRecord(i.Bundle))
		}
	}()
	if r.Downstream, err = i.startKata(ctx, shim, r.Events); err != nil {
		return err
	}
	if err := r.Write(i.Bundle); err != nil {
		return err
	}
	return i.startDaemon(ctx, tasks, events)
}

func unlinkIf(failed bool, path string) error {
	if !failed {
		return nil
	}
	return os.Remove(path)
}

// startKata runs `start` of Kata's binary.
func (i *Invocation) startKata(ctx context.Context, shim kata.Binary, events string) (kata.Endpoint, error) {
	call := kata.Call{Args: i.Args, Stdin: i.Stdin}
	if events != "" {
		call.Env = []string{EventsEnv + "=" + events}
	}
	out, err := shim.Run(ctx, call)
	if err != nil {
		return kata.Endpoint{}, fmt.Errorf("start Kata's shim: %w", err)
	}
	return kata.ParseStart(out)
}

// stopKata kills the shim that startKata has started, before it has any task.
func (i *Invocation) stopKata(e kata.Endpoint) error {
	err := killKata(i.Bundle, 0)
	if e.Address != "" {
		if rerr := os.Remove(e.Path()); !errors.Is(rerr, os.ErrNotExist) {
			err = errclass.Join(err, rerr)
		}
	}
	return err
}

// listen creates a socket, in place of one that a dead shim has left.
func listen(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	return l.File()
}

// startDaemon starts our daemon and waits until it serves.
func (i *Invocation) startDaemon(ctx context.Context, tasks, events *os.File) (err error) {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	defer ready.Close()
	// The same arguments as those of containerd's own shims.
	args := []string{"-namespace", i.Namespace, "-id", i.ID, "-address", i.Address}
	if i.Debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = i.Bundle
	cmd.ExtraFiles = []*os.File{TaskFD - 3: tasks, EventsFD - 3: events, ReadyFD - 3: theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	defer func() {
		if err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	if err := adjustOOMScore(cmd.Process.Pid); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	said, rerr := io.ReadAll(io.LimitReader(ready, 64<<10))
	switch {
	case string(said) == "ok":
		return nil
	case len(said) > 0:
		return fmt.Errorf("start the daemon: %w", errcode.Parse(string(bytes.TrimSpace(said))))
	case rerr != nil:
		return fmt.Errorf("start the daemon: it is not ready: %w", rerr)
	}
	return errors.New("start the daemon: it exited at once")
}

// adjustOOMScore makes the daemon slightly more likely to be killed than
// containerd, as in containerd's own shims (pkg/shim/util_unix.go).
func adjustOOMScore(pid int) error {
	score, err := sys.GetOOMScoreAdj(os.Getppid())
	if err != nil {
		return fmt.Errorf("OOM score: %w", err)
	}
	if err := sys.AdjustOOMScore(pid, min(score+1, 1000)); err != nil {
		return fmt.Errorf("OOM score: %w", err)
	}
	return nil
}
