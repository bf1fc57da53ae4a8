// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"slices"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/forward"
)

// services are the names under which the task API is served. The messages of
// both versions have the same fields.
var services = []string{"containerd.task.v2.Task", "containerd.task.v3.Task"}

// RegisterTTRPC implements the interface of containerd's TTRPC plugins.
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	methods := map[string]ttrpc.Method{
		"State":      handle(s.State),
		"Create":     handle(s.Create),
		"Start":      handle(s.Start),
		"Delete":     handle(s.Delete),
		"Pids":       handle(s.Pids),
		"Pause":      handle(s.Pause),
		"Resume":     handle(s.Resume),
		"Checkpoint": handle(s.Checkpoint),
		"Kill":       handle(s.Kill),
		"Exec":       handle(s.Exec),
		"ResizePty":  handle(s.ResizePty),
		"CloseIO":    handle(s.CloseIO),
		"Update":     handle(s.Update),
		"Wait":       handle(s.Wait),
		"Stats":      handle(s.Stats),
		"Connect":    handle(s.Connect),
		"Shutdown":   handle(s.Shutdown),
	}
	for _, name := range services {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods})
	}
	server.RegisterService("katacheckpoint.shim.v1.Shim", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{"Check": handle(s.Check)}})
	return nil
}

// bypassing are the calls that are always Kata's.
var bypassing = []string{"ResizePty", "Update", "Stats"}

// Handshaker wraps the handshaker of the server so that calls which are Kata's
// alone bypass the server; see package plugin/internal/forward.
func (s *Service) Handshaker(next ttrpc.Handshaker) ttrpc.Handshaker {
	return forward.Handshaker(next, s.down.path, s.bypasses)
}

// bypasses reports whether a call goes to Kata as containerd has written it.
// The other calls go to the methods of the service, which may forward them as
// well.
func (s *Service) bypasses(call *ttrpc.Request) bool {
	switch {
	case call.Service != s.down.service: // Kata serves one version only
		return false
	case call.Method == "Kill":
		r := &task.KillRequest{}
		if proto.Unmarshal(call.Payload, r) != nil {
			return false
		}
		c := s.container(r.ID)
		if c != nil && isEnd(r) {
			ask(&c.ending.kill)
		}
		return c.forwardsKill(r)
	}
	return slices.Contains(bypassing, call.Method)
}

// handle turns a method into a ttrpc handler. It is the only place where errors
// of this shim get their gRPC code; Kata's already have one.
func handle[Req any, PReq interface {
	*Req
	proto.Message
}, Resp proto.Message](method func(context.Context, PReq) (Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := PReq(new(Req))
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		resp, err := method(ctx, req)
		if err != nil {
			return nil, errclass.ToRPC(err)
		}
		return resp, nil
	}
}
