// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/subtle"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Any process of the host may connect to the agent's port: AF_VSOCK asks for no
// privilege. What it asks of a container it has to know a secret for, which the
// shim has put into the container's exchange directory, where only the host's root
// can read it, and which Adopt has compared with that.

// request is a request for a container.
type request interface {
	GetContainerId() string
	GetToken() string
}

// guard is the server's interceptor: no method sees a request for a container
// without its token.
func (a *Agent) guard(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	return method(ctx, func(message any) error {
		if err := unmarshal(message); err != nil {
			return err
		}
		if r, ok := message.(request); ok {
			return errclass.ToRPC(a.admit(r))
		}
		return nil
	})
}

// admit refuses a request without the token of a container that has one. The
// container of a record may have exited, and another one of its id be about to
// be adopted.
func (a *Agent) admit(r request) error {
	c, err := a.running(r.GetContainerId())
	if err != nil || c.Token == "" {
		return nil //nolint:nilerr // the method finds out
	}
	if subtle.ConstantTimeCompare([]byte(c.Token), []byte(r.GetToken())) == 0 {
		return errclass.With(errdefs.ErrPermissionDenied, errcode.ForeignRequest.Errorf("the request is not from the shim of container %s: it lacks the container's token", c.ID))
	}
	return nil
}
