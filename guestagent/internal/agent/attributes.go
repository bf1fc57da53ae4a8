// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/attributes"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
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

// ownCgroups finds processes of a container in cgroups that its own programs have
// made: a restored process is in the container's, without the limits of another.
func ownCgroups(c *container, look *inspect.Container) (out []inspect.Finding, err error) {
	tree := c.tree()
	err = filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path != tree {
			return nil // removed meanwhile
		}
		if err != nil || !e.IsDir() || path == tree {
			return err
		}
		pids, err := cgroup.Procs(path, false)
		if err != nil {
			return nil //nolint:nilerr // removed meanwhile, or with threads of several
		}
		for _, p := range look.Processes {
			if slices.Contains(pids, p.PID) {
				name := text.Line(strings.TrimPrefix(path, tree), text.MaxName)
				out = append(out, look.Refuse(p, errcode.OwnCgroup, "is in a cgroup of its own, "+name+", which no restore makes again", "move it to the container's own cgroup before the checkpoint, or terminate it"))
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the container's cgroups: %w", err)
	}
	return out, nil
}
