// SPDX-License-Identifier: Apache-2.0

package task

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

const (
	// restoreLogs is the directory below the state directory for CRIU's logs of
	// restores that failed. The bundle is no place for them: engines delete the
	// task at once.
	restoreLogs = "restore-logs"
	// maxRestoreLogs is how many are kept, the last ones.
	maxRestoreLogs = 10
	// maxRestoreLog bounds each of them, in bytes.
	maxRestoreLog = 16 << 20
)

// keepRestoreLog keeps CRIU's log of a restore that failed, if there is one, and
// adds its path to the error.
func (c *container) keepRestoreLog(ctx context.Context, failed error) error {
	path := filepath.Join(c.s.cfg.StateDir, restoreLogs, c.s.namespace+"-"+c.id+api.LogSuffix)
	err := c.copyRestoreLog(path)
	if errors.Is(err, fs.ErrNotExist) {
		return failed // CRIU has not run
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to keep CRIU's log")
		return failed
	}
	return fmt.Errorf("%w; CRIU's log is in %s", failed, path)
}

func (c *container) copyRestoreLog(path string) error {
	exchange := c.exchange.dir
	data, err := imageset.ReadFile(filepath.Dir(exchange), filepath.Base(exchange), restoreDir+api.LogSuffix, maxRestoreLog)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	return keepNewest(filepath.Dir(path), maxRestoreLogs)
}

// keepNewest removes all but the newest files of a directory. Another process
// may do the same.
func keepNewest(dir string, n int) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var files []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			files = append(files, info)
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int {
		return cmp.Or(b.ModTime().Compare(a.ModTime()), cmp.Compare(a.Name(), b.Name()))
	})
	for _, f := range files[min(n, len(files)):] {
		if e := os.Remove(filepath.Join(dir, f.Name())); !errors.Is(e, fs.ErrNotExist) {
			err = errclass.Join(err, e)
		}
	}
	return err
}
