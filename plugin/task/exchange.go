package task

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/api"
	"github.com/kata-checkpoint/kata-checkpoint/nri"
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
	e := &exchange{dir: nri.ExchangeDir(stateDir, namespace, id), token: rand.Text()}
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
