// SPDX-License-Identifier: Apache-2.0

// Package adjust computes what a container's OCI spec needs in addition so that
// the container can be checkpointed: the exchange mount and annotations.
// [Adjust] is a pure function with two callers: the NRI plugin (package nri),
// for what the CRI creates, and the shim (package plugin/internal/task), for
// every other engine and for containers that the plugin missed, since NRI
// creates containers without a plugin that is not connected.
package adjust

import (
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Container is the part of a container's spec that an adjustment depends on.
type Container struct {
	// Namespace is containerd's.
	Namespace   string
	ID          string
	Annotations map[string]string
	Mounts      []specs.Mount
}

// Adjustment is what is added to a spec.
type Adjustment struct {
	Mounts      []specs.Mount
	Annotations map[string]string
}

// Empty reports whether the spec needs nothing.
func (a *Adjustment) Empty() bool { return len(a.Mounts) == 0 && len(a.Annotations) == 0 }

// ExchangeDir is a container's exchange directory on the host. No identifier of
// containerd has two dashes in a row, so that no two pairs of namespace and id
// share a directory.
func ExchangeDir(stateDir, namespace, id string) string {
	return filepath.Join(stateDir, "exchange", namespace+"--"+id)
}

// StagingDir is where an image set is copied on its way to a container's exchange
// directory, on the same file system and out of the guest's sight.
func StagingDir(stateDir, namespace, id string) string {
	return ExchangeDir(stateDir, namespace, id) + "--staging"
}

// Adjust returns what a container's spec lacks. It is idempotent.
func Adjust(c Container, stateDir string) (*Adjustment, error) {
	a := &Adjustment{}
	want := specs.Mount{
		Destination: api.ExchangeDestination,
		Type:        "bind",
		Source:      ExchangeDir(stateDir, c.Namespace, c.ID),
		Options:     []string{"rbind", "rprivate", "rw"},
	}
	there := false
	for _, m := range c.Mounts {
		switch dest := path.Clean(m.Destination); {
		case dest == api.ExchangeDestination && m.Source == want.Source && m.Type == want.Type:
			there = true
		case dest == api.ExchangeDestination, strings.HasPrefix(dest, api.ExchangeDestination+"/"):
			return nil, errcode.OwnMount.Errorf("the container has a mount of its own at %s, which kata-checkpoint needs: mount it elsewhere", m.Destination)
		}
	}
	if !there {
		a.Mounts = append(a.Mounts, want)
	}

	has, err := annotations.ExternalMounts(c.Annotations)
	if err != nil {
		return nil, err
	}
	externals := slices.Clone(has)
	for _, m := range c.Mounts {
		dest := path.Clean(m.Destination)
		// The agent finds those whose name does not fit into the list on its own.
		external := isBind(m) || dest == "/dev/shm"
		if external && dest != api.ExchangeDestination && path.IsAbs(dest) && !strings.Contains(dest, ",") && !slices.Contains(externals, dest) {
			externals = append(externals, dest)
		}
	}
	if len(externals) > len(has) {
		slices.Sort(externals)
		a.Annotations = map[string]string{annotations.ExternalMountsKey: strings.Join(externals, ",")}
	}
	return a, nil
}

// Apply returns a spec's annotations and mounts with the adjustment.
func (a *Adjustment) Apply(old map[string]string, mounts []specs.Mount) (map[string]string, []specs.Mount) {
	all := maps.Clone(old)
	if all == nil && len(a.Annotations) > 0 {
		all = make(map[string]string)
	}
	maps.Copy(all, a.Annotations)
	return all, append(slices.Clone(mounts), a.Mounts...)
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}
