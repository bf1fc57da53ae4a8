// SPDX-License-Identifier: Apache-2.0

// Package register makes the task service a plugin of the shim's daemon. To be
// imported for its side effect.
package register

import (
	"fmt"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/task"
)

func init() {
	registry.Register(&plugin.Registration{
		Type: plugins.TTRPCPlugin,
		ID:   "task",
		Requires: []plugin.Type{
			plugins.EventPlugin,
			plugins.InternalPlugin,
		},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			o, err := ic.GetByID(plugins.InternalPlugin, "sandbox")
			if err != nil {
				return nil, fmt.Errorf("task service: %w", err)
			}
			return task.New(ic.Context, *o.(*task.Options))
		},
	})
}
