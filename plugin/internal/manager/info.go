// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// Info returns what Kata's binary reports about itself, with our name. Its
// annotations tell containerd which mounts it may leave to the runtime.
func Info(ctx context.Context, i *Invocation) ([]byte, error) {
	cfg, err := config.Load(config.Path())
	if err != nil {
		return nil, err
	}
	shim, err := kata.Find(cfg.DownstreamShim)
	if err != nil {
		return nil, err
	}
	out, err := shim.Run(ctx, kata.Call{Args: i.Args, Stdin: i.Stdin})
	if err != nil {
		return nil, fmt.Errorf("info of Kata's shim: %w", err)
	}
	info := &types.RuntimeInfo{}
	if err := proto.Unmarshal(out, info); err != nil {
		return nil, errcode.KataAnswer.Errorf("parse info of Kata's shim: %w; is downstream_shim in config.toml Kata's shim?", err)
	}
	if len(out) == 0 {
		return nil, errcode.KataAnswer.Wrap(errors.New("no info of Kata's shim: is downstream_shim in config.toml Kata's shim?"))
	}
	info.Name = Name
	return proto.Marshal(info)
}
