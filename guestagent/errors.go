package guestagent

import (
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

type empty = emptypb.Empty

// toRPC gives an error its gRPC code, at the boundary only.
func toRPC(err error) error {
	if err == nil {
		return nil
	}
	return errgrpc.ToGRPC(err)
}
