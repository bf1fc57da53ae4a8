// SPDX-License-Identifier: Apache-2.0

// Package guest is the stand-in for Kata's agent: PID 1 of the guest. It mounts
// the share, creates the sandbox's namespaces, and runs containers with
// Debian's runc such that they look like those of Kata's agent. Kata 4.1.0:
// src/agent.
//
// Call [Boot] first; [Serve] then never returns. The agent also starts its own
// binary in the modes [HookMode], [ExecMode] and [TerminalMode].
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
)

// anyCID accepts connections from any CID: there is only the host.
const anyCID = math.MaxUint32

// readySign is logged once the agent listens, in the same words as by Kata's
// agent, so that the VMM can wait for it.
const readySign = "ttRPC server started"

// Serve serves the shim until the guest stops.
func Serve(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	r := newReaper()
	go r.run()
	if console, err := debugConsoleWanted(); err != nil {
		return err
	} else if console {
		if err := serveConsole(r); err != nil {
			return err
		}
	}
	l, err := vsock.ListenContextID(anyCID, api.Port, nil)
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	api.RegisterAgentService(server, &service{newSandbox(r, self)})
	log.L.WithField("port", api.Port).Info(readySign)
	return server.Serve(ctx, l)
}

func debugConsoleWanted() (bool, error) {
	raw, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return false, fmt.Errorf("read the command line: %w", err)
	}
	return slices.Contains(strings.Fields(string(raw)), "agent.debug_console"), nil
}

// service maps requests to calls, and errors to gRPC codes.
type service struct {
	sandbox *sandbox
}

func done(err error) (*emptypb.Empty, error) {
	if err != nil {
		log.L.WithError(err).Error("request failed")
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

func (s *service) UpdateNetwork(_ context.Context, r *api.UpdateNetworkRequest) (*emptypb.Empty, error) {
	return done(updateNetwork(r))
}

func (s *service) CreateSandbox(_ context.Context, r *api.CreateSandboxRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.create(r))
}

func (s *service) CreateContainer(_ context.Context, r *api.CreateContainerRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.createContainer(r))
}

func (s *service) StartContainer(_ context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.with(r.Id, (*container).start))
}

func (s *service) RemoveContainer(_ context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.removeContainer(r.Id))
}

func (s *service) UpdateContainer(_ context.Context, r *api.UpdateContainerRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.with(r.Id, func(c *container) error { return c.update(r.Resources) }))
}

func (s *service) Stats(_ context.Context, r *api.ContainerRequest) (*api.StatsResponse, error) {
	// Without the lock: a frozen container has statistics as well.
	s.sandbox.found.Lock()
	group, ok := s.sandbox.groups[r.Id]
	s.sandbox.found.Unlock()
	if !ok {
		_, err := done(notFound(r.Id))
		return nil, err
	}
	raw, err := proto.Marshal(group.stats())
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &api.StatsResponse{Metrics: raw}, nil
}

func (s *service) ExecProcess(_ context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.exec(r))
}

func (s *service) SignalProcess(_ context.Context, r *api.SignalProcessRequest) (*emptypb.Empty, error) {
	return done(s.sandbox.signal(r.Id, r.ExecId, unix.Signal(r.Signal)))
}

func (s *service) WaitProcess(ctx context.Context, r *api.ProcessRequest) (*api.WaitProcessResponse, error) {
	p, err := s.sandbox.lookUp(r.Id, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	select {
	case <-p.done:
		return &api.WaitProcessResponse{Status: p.status}, nil
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
}

func (s *service) ResizeTerminal(_ context.Context, r *api.ResizeTerminalRequest) (*emptypb.Empty, error) {
	p, err := s.sandbox.lookUp(r.Id, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return done(p.streams.resize(r.Width, r.Height))
}

func (s *service) ReadStdout(_ context.Context, r *api.ReadStreamRequest) (*api.ReadStreamResponse, error) {
	return s.read(r, func(s *streams) *os.File { return s.stdout })
}

func (s *service) ReadStderr(_ context.Context, r *api.ReadStreamRequest) (*api.ReadStreamResponse, error) {
	return s.read(r, func(s *streams) *os.File { return s.stderr })
}

func (s *service) read(r *api.ReadStreamRequest, stream func(*streams) *os.File) (*api.ReadStreamResponse, error) {
	p, err := s.sandbox.lookUp(r.Id, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	f := stream(p.streams)
	if f == nil {
		return &api.ReadStreamResponse{Eof: true}, nil
	}
	buffer := make([]byte, min(r.Len, api.MaxChunk))
	n, err := f.Read(buffer)
	switch {
	case n > 0:
		return &api.ReadStreamResponse{Data: buffer[:n]}, nil
	case errors.Is(err, io.EOF), ended(err):
		return &api.ReadStreamResponse{Eof: true}, nil
	}
	return nil, errgrpc.ToGRPC(fmt.Errorf("read the output of process %q of container %s: %w", r.ExecId, r.Id, err))
}

func (s *service) WriteStdin(_ context.Context, r *api.WriteStreamRequest) (*emptypb.Empty, error) {
	p, err := s.sandbox.lookUp(r.Id, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	_, err = p.streams.stdin.Write(r.Data)
	return done(err)
}

func (s *service) CloseStdin(_ context.Context, r *api.ProcessRequest) (*emptypb.Empty, error) {
	p, err := s.sandbox.lookUp(r.Id, r.ExecId)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	p.closeStdin()
	return done(nil)
}
