package task

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// restoreDir is the name of an image set that is to be restored, in the
// exchange directory.
const restoreDir = "restore"

// exchange is the host directory by which a container's images travel between
// host and guest.
type exchange struct {
	dir string
	// token is in the marker file: by it the agent knows the right mount.
	token string
}

// newExchange makes a container's exchange directory. What one of the same
// name left behind is removed: containerd lets no two tasks have one name.
func newExchange(stateDir, namespace, id string) (*exchange, error) {
	e := &exchange{dir: adjust.ExchangeDir(stateDir, namespace, id), token: rand.Text()}
	if err := os.RemoveAll(e.dir); err != nil {
		return nil, fmt.Errorf("exchange directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(e.dir), 0o700); err != nil {
		return nil, fmt.Errorf("exchange directory: %w", err)
	}
	if err := os.Mkdir(e.dir, 0o700); err != nil {
		return nil, fmt.Errorf("exchange directory: %w", err)
	}
	if err := os.WriteFile(filepath.Join(e.dir, api.MarkerName), []byte(e.token), 0o600); err != nil {
		return nil, fmt.Errorf("exchange directory: %w", err)
	}
	return e, nil
}

func (e *exchange) path(name string) string { return filepath.Join(e.dir, name) }

const (
	// discardWait is how long images of no more use wait for a thaw.
	discardWait = 30 * time.Second
	// discardTimeout bounds what the guest has to do to remove them.
	discardTimeout = 30 * time.Second
)

// discard removes images that are of no more use. The guest does it: of files
// that the host removes, its kernel keeps what it has in memory until it is short
// of that, and each checkpoint would make the VM larger by its image set. It has
// time until the container runs again.
func (c *container) discardImages(images string) {
	if c.execGate.enter(c.s.base, discardWait) == nil {
		c.execGate.leave()
	}
	ctx, cancel := context.WithTimeout(c.s.base, discardTimeout)
	defer cancel()
	err := c.s.agent.Notify(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Discard(ctx, &api.DiscardRequest{ContainerId: c.id, Directory: images})
		return err
	})
	logger := log.G(ctx).WithField("container", c.id)
	if err != nil {
		logger.WithError(err).Debug("the guest did not remove images that are of no more use")
	}
	if err := os.RemoveAll(c.exchange.path(images)); err != nil {
		logger.WithError(err).Warn("remove images that are of no more use")
	}
}

// remove deletes the directory. Where it is still mounted in a container,
// nothing can be written by way of it from then on: in a directory that is
// removed no file system makes new entries.
func (e *exchange) remove() error {
	if e == nil {
		return nil
	}
	if err := os.RemoveAll(e.dir); err != nil {
		return fmt.Errorf("remove exchange directory: %w", err)
	}
	return nil
}
