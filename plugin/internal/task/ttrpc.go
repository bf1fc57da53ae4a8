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

// services are the names under which the task API is served: the messages of
// both versions are the same, field by field.
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
	return nil
}

// unread are the calls that are Kata's whatever they say.
var unread = []string{"ResizePty", "Update", "Stats"}

// Handshaker has the calls that are Kata's alone pass by the server: next comes
// first on every connection.
func (s *Service) Handshaker(next ttrpc.Handshaker) ttrpc.Handshaker {
	return forward.Handshaker(next, s.down.path, s.bypasses)
}

// bypasses says whether Kata is to get a call as containerd wrote it. What
// it says no to is for the methods below, which may come to forward it.
func (s *Service) bypasses(call *ttrpc.Request) bool {
	switch {
	case call.Service != s.down.service: // the other version's name
		return false
	case call.Method == "Kill":
		r := &task.KillRequest{}
		return proto.Unmarshal(call.Payload, r) == nil && s.container(r.ID).forwardsKill(r)
	}
	return slices.Contains(unread, call.Method)
}

// handle turns a method into ttrpc's form. Errors of our own get their code
// here and nowhere else; those of Kata's have theirs.
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
