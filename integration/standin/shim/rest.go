// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Pids returns the VMM's pid.
func (s *service) Pids(context.Context, *task.PidsRequest) (*task.PidsResponse, error) {
	return &task.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: s.lockedPid()}}}, nil
}

// errKept: who checkpoints below Kata has to pause without Kata, which accepts
// these requests but breaks if a paused container exits.
var errKept = errors.New("a pause or resume was forwarded, which breaks on Kata")

// Pause is an error.
func (s *service) Pause(_ context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	log.L.WithField("container", r.ID).Error(errKept)
	return nil, errKept
}

// Resume is an error.
func (s *service) Resume(_ context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	log.L.WithField("container", r.ID).Error(errKept)
	return nil, errKept
}

// Checkpoint fails as unimplemented, in the words of either shim.
func (s *service) Checkpoint(context.Context, *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	if s.way == way.Rust {
		return nil, status.Error(codes.NotFound, "/containerd.task.v2.Task/Checkpoint is not supported")
	}
	return nil, fmt.Errorf("service Checkpoint: %w", errdefs.ErrNotImplemented)
}

// Update changes a container's limits.
func (s *service) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	_, leave, err := s.enter(r.ID)
	if err != nil {
		return nil, err
	}
	defer leave()
	if _, err := s.sandbox.Agent.UpdateContainer(ctx, &api.UpdateContainerRequest{Id: r.ID, Resources: r.Resources.GetValue()}); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// Stats returns a container's metrics in the guest.
func (s *service) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	_, leave, err := s.enter(r.ID)
	if err != nil {
		return nil, err
	}
	defer leave()
	answer, err := s.sandbox.Agent.Stats(ctx, &api.ContainerRequest{Id: r.ID})
	if err != nil {
		return nil, err
	}
	return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: "io.containerd.cgroups.v2.Metrics", Value: answer.Metrics}}, nil
}

// Shutdown stops the shim when its sandbox is stopped. The Go way exits before
// it answers.
func (s *service) Shutdown(_ context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	containers, sandbox := len(s.containers), s.sandbox
	s.mu.Unlock()
	if s.way == way.Rust {
		if r.Now || r.ID == s.id {
			if sandbox != nil {
				s.endSandbox()
			}
			go s.exit()
		}
		return &emptypb.Empty{}, nil
	}
	if containers > 0 {
		return &emptypb.Empty{}, nil
	}
	s.teardown.Wait()
	if sandbox != nil {
		_ = syscall.Kill(int(sandbox.Pid()), syscall.SIGKILL)
		s.endSandbox()
	}
	s.exit()
	return &emptypb.Empty{}, nil
}

// asKata is the server interceptor for what all requests have in common. A
// caller that gives up cancels nothing: a signal that waited for a lock is
// still sent. Errors become gRPC codes; the Rust shim uses one for everything.
func asKata(w way.Way) ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
		answer, err := method(context.WithoutCancel(ctx), unmarshal)
		if err == nil {
			return answer, nil
		}
		// An answer of the agent has a code already.
		if _, ok := status.FromError(err); ok {
			err = errgrpc.ToNative(err)
		}
		log.L.WithError(err).WithField("method", info.FullMethod).Info("request failed")
		if w == way.Rust && info.FullMethod != "/containerd.task.v2.Task/Checkpoint" {
			return nil, status.Errorf(codes.Unknown, "failed to handle message %v", err)
		}
		return nil, errgrpc.ToGRPC(err)
	}
}
