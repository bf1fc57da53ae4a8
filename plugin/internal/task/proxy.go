package task

import (
	"context"
	"errors"
	"slices"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/forward"
)

// services are the names under which the task API is served: the messages of
// both versions are the same, field by field.
var services = []string{"containerd.task.v2.Task", "containerd.task.v3.Task"}

// RegisterTTRPC implements the interface of containerd's TTRPC plugins.
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	methods := map[string]ttrpc.Method{
		"Create":     handle(s.Create),
		"Start":      handle(s.Start),
		"Delete":     handle(s.Delete),
		"Exec":       handle(s.Exec),
		"State":      handle(s.State),
		"Pause":      handle(s.Pause),
		"Resume":     handle(s.Resume),
		"Checkpoint": handle(s.Checkpoint),
		"Shutdown":   handle(s.Shutdown),
		"Wait":       handle(s.Wait),
		"Kill":       handle(s.Kill),
		"CloseIO":    handle(s.CloseIO),
		"Connect":    handle(s.Connect),
		"Pids":       handle(s.Pids),
	}
	for _, name := range unread {
		methods[name] = s.forward(name)
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
	return forward.Handshaker(next, s.down.path, s.passesUnread)
}

// passesUnread says whether Kata is to get a call as containerd wrote it. What
// it says no to is for the methods below, which may come to forward it.
func (s *Service) passesUnread(call *ttrpc.Request) bool {
	switch {
	case call.Service != s.down.service: // the other version's name
		return false
	case call.Method == "Kill":
		r := &task.KillRequest{}
		return proto.Unmarshal(call.Payload, r) == nil && s.container(r.ID).leavesKill(r)
	}
	return slices.Contains(unread, call.Method)
}

// forward passes a call on, unread: an empty message keeps every field that it
// does not know.
func (s *Service) forward(method string) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var req, resp emptypb.Empty
		if err := unmarshal(&req); err != nil {
			return nil, err
		}
		if err := s.pass(ctx, method, &req, &resp); err != nil {
			return nil, toGRPC(err)
		}
		return &resp, nil
	}
}

// pass forwards a call. When Kata's shim dies meanwhile it does not return
// before the connection to containerd ends, too: that is what containerd takes
// for a dead shim, an error it takes for an answer
// (core/runtime/v2/shim.go, delete).
func (s *Service) pass(ctx context.Context, method string, req, resp proto.Message) error {
	err := s.down.call(ctx, method, req, resp)
	if err != nil && errors.Is(err, ttrpc.ErrClosed) {
		<-ctx.Done()
		return errKataGone
	}
	return err
}

// passToEnd is pass for what Kata does to the end whether or not anybody waits:
// ttrpc cannot call it off. So that we know what there is when containerd was
// killed meanwhile, it ends with its caller's deadline, and not with its caller.
func (s *Service) passToEnd(ctx context.Context, method string, req, resp proto.Message) error {
	kctx, cancel := context.WithoutCancel(ctx), func() {}
	if limit, ok := ctx.Deadline(); ok {
		kctx, cancel = context.WithDeadline(kctx, limit)
	}
	defer cancel()
	err := s.down.call(kctx, method, req, resp)
	if err != nil && errors.Is(err, ttrpc.ErrClosed) {
		<-ctx.Done()
		return errKataGone
	}
	return err
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
			return nil, toGRPC(err)
		}
		return resp, nil
	}
}

// toGRPC gives an error its code. The errors that it was made of stay behind:
// engines would print each of them again.
func toGRPC(err error) error {
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok { // Kata's own, not one that was wrapped
		return err
	}
	code := codes.Unknown
	if st, ok := status.FromError(errgrpc.ToGRPC(errdefs.Resolve(err))); ok {
		code = st.Code()
	}
	return status.Error(code, err.Error())
}

// passEmpty is pass for a call whose answer says nothing.
func (s *Service) passEmpty(ctx context.Context, method string, req proto.Message) (*emptypb.Empty, error) {
	resp := &emptypb.Empty{}
	return resp, s.pass(ctx, method, req, resp)
}
