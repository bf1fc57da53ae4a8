// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/archive"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/netgate"
)

// netgateState is what the gate of the sandbox's network namespace holds back: the
// connections of containers that have ended with a checkpoint, or are yet to be
// restored. A failed restore leaves it closed: another one may still find the
// connections alive.
type netgateState struct {
	mu sync.Mutex
	// path is that of the namespace, or empty where the engine has made none.
	path string
	// held has a container's connections by its key, see [container.netgateKey].
	held map[string][]netgate.Connection
}

// netgateKey is by what a container's connections are found again by the one that
// they are restored into: in a pod a container of the same name takes its place.
func (c *container) netgateKey() string {
	if name := annotations.ContainerName(c.annotations); name != "" {
		return name
	}
	return c.id
}

// closeNetgate comes before Kata creates a container: before the sandbox has a VM,
// for all that is going to be restored in it.
func (s *Service) closeNetgate(ctx context.Context, c *container, spec *bundle.Spec) {
	var own []imageset.Connection
	if c.source != nil {
		own = c.source.manifest.Connections
	}
	if c.id != s.sandbox {
		s.holdConnections(ctx, c.netgateKey(), own)
		return
	}
	held := make(map[string][]netgate.Connection)
	if len(own) > 0 {
		held[c.netgateKey()] = gated(own)
	}
	for key, name := range spec.Annotations {
		container, ok := strings.CutPrefix(key, annotations.RestorePrefix)
		if !ok || c.kind != annotations.Sandbox {
			continue
		}
		// What is wrong with an archive is the container's to say, when it is created.
		m, err := archive.Manifest(ctx, s.cfg.RestoreDir, name)
		if err == nil {
			err = c.permitNamespace(m)
		}
		if err != nil {
			log.G(ctx).WithError(err).WithFields(log.Fields{"container": container, "archive": name}).Warn("failed to look for TCP connections")
			continue
		}
		if len(m.Connections) > 0 {
			held[container] = gated(m.Connections)
		}
	}
	s.netgate.mu.Lock()
	defer s.netgate.mu.Unlock()
	s.netgate.path, s.netgate.held = spec.NetworkNamespace(), held
	// Without connections it opens the gate that an earlier sandbox may have left.
	s.setNetgate(ctx)
}

// holdConnections has the gate hold back a container's connections, and no others of
// it.
func (s *Service) holdConnections(ctx context.Context, key string, list []imageset.Connection) {
	s.netgate.mu.Lock()
	defer s.netgate.mu.Unlock()
	if len(s.netgate.held[key]) == 0 && len(list) == 0 {
		return
	}
	delete(s.netgate.held, key)
	if len(list) > 0 {
		s.netgate.held[key] = gated(list)
	}
	s.setNetgate(ctx)
}

// releaseConnections has the gate let a container's connections through again.
func (s *Service) releaseConnections(ctx context.Context, key string) {
	s.holdConnections(ctx, key, nil)
}

// setNetgate is called with the lock held. No operation fails for it: a peer that
// sends nothing meanwhile notices nothing.
func (s *Service) setNetgate(ctx context.Context) {
	all := slices.Concat(slices.Collect(maps.Values(s.netgate.held))...)
	logger := log.G(ctx).WithFields(log.Fields{"connections": len(all), "namespace": s.netgate.path})
	if s.netgate.path == "" {
		if len(all) > 0 {
			logger.Warn("the engine names no network namespace: peers that send while a TCP connection is away may reset it")
		}
		return
	}
	if err := netgate.Close(s.netgate.path, all); err != nil {
		logger.WithError(err).Warn("failed to set the network gate: peers that send while a TCP connection is away may reset it")
		return
	}
	if len(all) > 0 {
		logger.Info("network gate closed")
	}
}

func gated(list []imageset.Connection) []netgate.Connection {
	out := make([]netgate.Connection, 0, len(list))
	for _, c := range list {
		out = append(out, netgate.Connection{Local: c.Local, Remote: c.Remote})
	}
	return out
}
