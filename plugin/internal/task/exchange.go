// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
)

// restoreDir is the name in the exchange directory of an image set that is to
// be restored.
const restoreDir = "restore"

// exchange is the host directory through which a container's images are passed
// between host and guest.
type exchange struct {
	dir string
	// token is the content of the marker file, by which the agent recognizes the
	// mount.
	token string
}

// newExchange creates a container's exchange directory. It removes what an
// earlier container of the same name left behind: containerd has at most one
// task of a name.
func newExchange(stateDir, namespace, id string) (*exchange, error) {
	e := &exchange{dir: adjust.ExchangeDir(stateDir, namespace, id), token: rand.Text()}
	if err := remove.All(e.dir); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(e.dir), 0o700); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	if err := os.Mkdir(e.dir, 0o700); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	if err := os.WriteFile(filepath.Join(e.dir, api.MarkerName), []byte(e.token), 0o600); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	return e, nil
}

func (e *exchange) path(name string) string { return filepath.Join(e.dir, name) }

const (
	// discardWait is how long stale images are kept while the container is frozen.
	discardWait = 30 * time.Second
	// discardTimeout bounds their removal by the guest.
	discardTimeout = 30 * time.Second
)

// discardImages removes stale images, once the container is running again. The
// guest removes them: its kernel would keep the cached pages of files that the
// host removes until it is short of memory, and each checkpoint would make the
// VM larger by its image set.
func (c *container) discardImages(images string) {
	if c.execGate.enter(c.s.base, discardWait) == nil {
		c.execGate.leave()
	}
	ctx, cancel := context.WithTimeout(c.s.base, discardTimeout)
	defer cancel()
	err := c.s.agent.Notify(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Discard(ctx, &api.DiscardRequest{ContainerId: c.id, Directory: images, Token: c.exchange.token})
		return err
	})
	logger := log.G(ctx).WithField("container", c.id)
	if err != nil {
		logger.WithError(err).Debug("failed to have the guest remove stale images")
	}
	if err := remove.All(c.exchange.path(images)); err != nil {
		logger.WithError(err).Warn("failed to remove stale images")
	}
}

// present reports whether the directory is there, and not that of another
// container of the same name.
func (e *exchange) present() bool {
	if e == nil {
		return false
	}
	f, _, err := regular.Open(unix.AT_FDCWD, e.path(api.MarkerName), 0)
	if err != nil {
		return false
	}
	defer f.Close()
	token, err := io.ReadAll(io.LimitReader(f, int64(len(e.token))+1))
	return err == nil && string(token) == e.token
}

// remove removes the directory. Even where it is still mounted in a container,
// nothing can be written through it from then on: no file system creates
// entries in a removed directory.
func (e *exchange) remove() error {
	if e == nil {
		return nil
	}
	if err := remove.All(e.dir); err != nil {
		return fmt.Errorf("remove exchange directory: %w", err)
	}
	return nil
}
