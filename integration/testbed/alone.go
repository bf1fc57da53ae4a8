// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// UpAlone is [Up] for a program whose testbed is always in the same directory:
// the testbed of an interrupted run is removed first, and a second concurrent
// run fails until the first one calls release, after Down.
func UpAlone(ctx context.Context, o Options) (t *Testbed, release func(), err error) {
	if err := os.MkdirAll(filepath.Dir(o.Dir), 0o755); err != nil {
		return nil, nil, fmt.Errorf("testbed: %w", err)
	}
	lock, err := os.OpenFile(o.Dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("testbed: %w", err)
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, nil, fmt.Errorf("testbed: %s is in use by another run: %w", o.Dir, err)
	}
	old, err := Open(o.Dir)
	if err == nil {
		err = old.Down(ctx)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if t, err = Up(ctx, o); err != nil {
		return nil, nil, err
	}
	return t, func() { lock.Close() }, nil
}
