// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/attributes"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// readAttributes lists what CRIU does not dump of frozen threads.
func readAttributes(ctx context.Context, c *container, look *inspect.Container) ([]*api.Attribute, error) {
	list, all, err := attributes.Read(ctx, look, c.tree())
	if err == nil && !all {
		log.G(ctx).WithField("container", c.ID).Warnf("threads have more than %d attributes that CRIU does not restore: the others will be lost", attributes.Max)
	}
	return list, err
}

// applyAttributes sets them in restored processes, which are frozen. What this
// guest does not have, such as a CPU, is left out and logged.
func applyAttributes(ctx context.Context, c *container, r *api.RestoreRequest, tree string) error {
	if len(r.GetAttributes()) == 0 {
		return nil
	}
	pids, err := cgroup.Procs(tree, true)
	if err != nil {
		return fmt.Errorf("list the restored processes: %w", err)
	}
	t := attributes.Target{PIDs: pids, SysNice: slices.Contains(r.GetRights().GetPermitted(), "CAP_SYS_NICE")}
	failed, err := attributes.Apply(ctx, t, r.GetAttributes())
	for _, err := range failed {
		log.G(ctx).WithField("container", c.ID).WithError(err).Warn("a thread is not quite as it was")
	}
	return err
}
