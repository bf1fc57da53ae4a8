package agent

import (
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

type empty = emptypb.Empty

// toRPC gives an error its gRPC code, at the boundary only. The details that
// errgrpc would add repeat the message, once for every error in the chain.
func toRPC(err error) error {
	if err == nil {
		return nil
	}
	code := codes.Unknown
	if st, ok := status.FromError(errgrpc.ToGRPC(errdefs.Resolve(err))); ok {
		code = st.Code()
	}
	return status.Error(code, err.Error())
}
