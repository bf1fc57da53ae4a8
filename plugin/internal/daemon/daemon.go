// SPDX-License-Identifier: Apache-2.0

// Package daemon is the shim's long-running process: it serves the task service
// that is registered as a plugin in containerd's registry (package
// plugin/internal/task/register), and receives the events of Kata's shim.
// `start` (package plugin/internal/manager) passes it its sockets and waits
// until it is ready.
//
// containerd's own main loop (pkg/shim, Run) is not used: before it exits, it
// removes the socket that the bundle's file `address` names, which is Kata's.
//
// Written against containerd 2.4.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/events"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/manager"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/task"
)

const (
	// drainTimeout bounds the delivery of the last events.
	drainTimeout = 3 * time.Second
	// linger is the time for the last answers to be written.
	linger = 100 * time.Millisecond
	// gcPercent trades time for memory, as in containerd's own shims: every pod
	// has one of these processes.
	gcPercent = 40
)

// ttrpcService is what a plugin of type TTRPC implements.
type ttrpcService interface {
	RegisterTTRPC(*ttrpc.Server) error
}

// handshaking is a service that sees connections before the server does.
type handshaking interface {
	Handshaker(next ttrpc.Handshaker) ttrpc.Handshaker
}

// Run serves until the shim is shut down. An error before that is also reported
// to start.
func Run(ctx context.Context, i *manager.Invocation) error {
	debug.SetGCPercent(gcPercent)
	// A log or a peer that closes must not kill this process.
	signal.Ignore(syscall.SIGPIPE)
	openLog(i.Debug)
	ready := os.NewFile(manager.ReadyFD, "ready")
	d, err := newDaemon(namespaces.WithNamespace(ctx, i.Namespace), i)
	if err != nil {
		_, werr := io.WriteString(ready, errcode.Text(err))
		return errclass.Join(err, werr, ready.Close())
	}
	// If this fails, start has exited, and containerd calls delete.
	_, err = io.WriteString(ready, "ok")
	if err := errclass.Join(err, ready.Close()); err != nil {
		log.G(ctx).WithError(err).Warn("failed to report readiness to start")
	}
	return d.serve()
}

type daemon struct {
	ctx      context.Context
	relay    *events.Relay
	shutdown shutdown.Service
	tasks    *ttrpc.Server
	events   *ttrpc.Server
	unlink   func()

	taskListener, eventListener net.Listener
}

// sweep removes what an earlier boot has left. What takes time it does not wait
// for: it ends with the process, and the next daemon continues.
func sweep(ctx context.Context, stateDir string) {
	warn := func(err error) {
		if err != nil {
			log.G(ctx).WithError(err).Warn("failed to remove what containers of an earlier boot have left")
		}
	}
	warn(manager.Sweep(stateDir))
	go func() { warn(manager.RemoveSwept(stateDir)) }()
}

func newDaemon(ctx context.Context, i *manager.Invocation) (*daemon, error) {
	cfg, err := config.Load(config.Path())
	if err != nil {
		return nil, err
	}
	r, err := bundle.ReadRecord(i.Bundle)
	if err != nil {
		return nil, err
	}
	r.PID = os.Getpid()
	if r.StartTime, err = procfs.StartTime(r.PID); err != nil {
		return nil, err
	}
	if err := r.Write(i.Bundle); err != nil {
		return nil, err
	}
	ctx = log.WithLogger(ctx, log.G(ctx).WithFields(log.Fields{"runtime": manager.Name, "sandbox": r.Sandbox}))
	sweep(ctx, cfg.StateDir)
	d := &daemon{relay: events.NewRelay(i.Namespace, os.Getenv(manager.EventsEnv))}
	d.ctx, d.shutdown = shutdown.WithShutdown(ctx)
	if d.taskListener, err = inherit(manager.TaskFD); err != nil {
		return nil, err
	}
	if d.eventListener, err = inherit(manager.EventsFD); err != nil {
		return nil, err
	}
	d.unlink = unlinker(strings.TrimPrefix(r.Address, "unix://"), r.Events)

	register("shutdown", plugins.InternalPlugin, d.shutdown)
	register("publisher", plugins.EventPlugin, d.relay)
	register("sandbox", plugins.InternalPlugin, &task.Options{
		Config: cfg, Namespace: i.Namespace, Sandbox: r.Sandbox,
		Downstream: r.Downstream, Management: kata.DefaultManagement,
		Events: d.relay, Shutdown: d.shutdown, Unlink: d.unlink,
		EndKata:      func() error { return manager.EndKata(i.Bundle, r.Sandbox) },
		ProtectShare: func() error { return manager.ProtectShare(i.Bundle, r.Sandbox) },
		SetWritable:  func(dir string, writable bool) error { return manager.SetWritable(i.Bundle, r.Sandbox, dir, writable) },
		Virtiofsd:    func() (*os.File, error) { return manager.Virtiofsd(i.Bundle, r.Sandbox) },
	})
	services, err := initPlugins(d.ctx)
	if err != nil {
		return nil, err
	}
	same := ttrpc.UnixSocketRequireSameUser()
	if d.events, err = ttrpc.NewServer(ttrpc.WithServerHandshaker(same)); err != nil {
		return nil, err
	}
	var first ttrpc.Handshaker = same
	for _, s := range services {
		if h, ok := s.(handshaking); ok {
			first = h.Handshaker(first)
		}
	}
	if d.tasks, err = ttrpc.NewServer(ttrpc.WithServerHandshaker(first)); err != nil {
		return nil, err
	}
	for _, s := range services {
		if err := s.RegisterTTRPC(d.tasks); err != nil {
			return nil, err
		}
	}
	forward.RegisterTTRPCEventsService(d.events, d.relay)
	return d, nil
}

func register(id string, kind plugin.Type, instance any) {
	registry.Register(&plugin.Registration{
		Type: kind, ID: id,
		InitFn: func(*plugin.InitContext) (any, error) { return instance, nil },
	})
}

// initPlugins starts what is registered, each after what it requires.
func initPlugins(ctx context.Context) ([]ttrpcService, error) {
	var services []ttrpcService
	initialized := plugin.NewPluginSet()
	for _, p := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		result := p.Init(plugin.NewContext(ctx, initialized, nil))
		if err := initialized.Add(result); err != nil {
			return nil, fmt.Errorf("plugin %s: %w", p.URI(), err)
		}
		instance, err := result.Instance()
		if err != nil {
			return nil, fmt.Errorf("plugin %s: %w", p.URI(), err)
		}
		if s, ok := instance.(ttrpcService); ok {
			services = append(services, s)
		}
	}
	if len(services) == 0 {
		return nil, errors.New("no task service is registered")
	}
	return services, nil
}

// serve returns when the shim has been shut down.
func (d *daemon) serve() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	failed := make(chan error, 2)
	for server, l := range map[*ttrpc.Server]net.Listener{d.tasks: d.taskListener, d.events: d.eventListener} {
		// Calls end with their connection, not with the shutdown: those that wait for
		// a Kata that is gone must not be answered.
		go func() { failed <- server.Serve(context.WithoutCancel(d.ctx), l) }()
	}
	log.G(d.ctx).WithField("version", version.Version).Info("serving")

	var err error
	select {
	case <-d.shutdown.Done():
	case s := <-signals:
		log.G(d.ctx).WithField("signal", s).Info("received signal, shutting down")
		d.shutdown.Shutdown()
		<-d.shutdown.Done()
	case err = <-failed:
		d.shutdown.Shutdown()
		<-d.shutdown.Done()
	}
	if serr := d.shutdown.Err(); !errors.Is(serr, shutdown.ErrShutdown) {
		err = errclass.Join(err, serr)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(d.ctx), drainTimeout)
	defer cancel()
	if ferr := d.relay.Flush(ctx); ferr != nil {
		log.G(ctx).WithError(ferr).Warn("failed to deliver the last events")
	}
	d.unlink()
	// Let answers in progress be written, Shutdown's above all: ttrpc's own
	// Shutdown closes connections with calls that it has not counted yet. Calls
	// that wait for a Kata that is gone end with this process.
	time.Sleep(linger) //nolint:forbidigo // nothing tells when they are written
	log.G(ctx).Info("shut down")
	return errclass.Join(err, d.relay.Close())
}

func inherit(fd uintptr) (net.Listener, error) {
	f := os.NewFile(fd, "socket")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("inherited socket %d: %w", fd, err)
	}
	return l, nil
}

// unlinker returns a function that removes the sockets, unless other files have
// got their names meanwhile.
func unlinker(paths ...string) func() {
	own := make(map[string]os.FileInfo)
	for _, p := range paths {
		if st, err := os.Lstat(p); err == nil {
			own[p] = st
		}
	}
	return func() {
		for p, was := range own {
			if st, err := os.Lstat(p); err == nil && os.SameFile(st, was) {
				os.Remove(p)
			}
		}
	}
}
