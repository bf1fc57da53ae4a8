// SPDX-License-Identifier: Apache-2.0

package task

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// onceRecord is the file that records that the container of a name was restored
// in its pod, as the pod's annotation demands, which happens once: two processes
// with the same memory would do the same thing twice. A pod's UID is never
// reused; a new sandbox of the same pod, as after a node's crash, has the same.
//
// The record says so before the restore, because a crash may come before it
// succeeds, and after it. The methods of a nil record do nothing.
type onceRecord struct{ path string }

const (
	// restoredDir is below the state directory.
	restoredDir = "restored"
	// restoredFor is how long a record is kept at least: longer than pods live.
	restoredFor = 366 * 24 * time.Hour
	// restoredKept is how many are kept however old they seem: a clock that was
	// wrong when they were written, or is now, must not have a container restored
	// twice.
	restoredKept = 10000
	// intent is the record's content until it is confirmed.
	intent = "restoring\n"
)

func (c *container) onceRecord() *onceRecord {
	pod := annotations.PodUID(c.annotations)
	if pod == "" {
		pod = c.s.sandbox
	}
	name := annotations.PodNamespace(c.annotations) + "--" + pod + "--" + annotations.ContainerName(c.annotations)
	return &onceRecord{filepath.Join(c.s.cfg.StateDir, restoredDir, filepath.Base(name))}
}

// done reports whether the container was restored. It is an error if nobody knows.
func (o *onceRecord) done() (bool, error) {
	content, err := os.ReadFile(o.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case string(content) == intent:
		return false, errclass.With(errdefs.ErrFailedPrecondition, errcode.Interrupted.Errorf("a restore of this container in this pod was interrupted, and it may have run since: "+
			"to restore it once more all the same, remove %s on this node; to have it begin from its start, create the pod without the annotation", o.path))
	}
	return true, nil
}

// begin records the intent to restore, and removes records of pods that are long
// gone.
func (o *onceRecord) begin() error {
	if o == nil {
		return nil
	}
	dir := filepath.Dir(o.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := o.write(intent); err != nil {
		return fmt.Errorf("record that the container is restored: %w", err)
	}
	return removeOld(dir, restoredKept)
}

// removeOld removes the oldest records, if they are older than [restoredFor], until
// so many are left.
func removeOld(dir string, kept int) error {
	records, err := os.ReadDir(dir)
	if err != nil || len(records) <= kept {
		return err
	}
	var old []fs.FileInfo
	for _, r := range records {
		if info, err := r.Info(); err == nil && time.Since(info.ModTime()) > restoredFor {
			old = append(old, info)
		}
	}
	slices.SortFunc(old, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, info := range old[:min(len(old), len(records)-kept)] {
		err = errclass.Join(err, os.Remove(filepath.Join(dir, info.Name())))
	}
	return err
}

// confirm records that the container was restored.
func (o *onceRecord) confirm() error {
	if o == nil {
		return nil
	}
	return o.write("")
}

// cancel removes the record of a restore of which nothing is left.
func (o *onceRecord) cancel() error {
	if o == nil {
		return nil
	}
	if err := os.Remove(o.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(o.path))
}

// write replaces the record, and waits until it is on the disk.
func (o *onceRecord) write(content string) error {
	dir := filepath.Dir(o.path)
	f, err := os.CreateTemp(dir, ".record-")
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	err = errclass.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), o.path)
	}
	if err != nil {
		return errclass.Join(err, os.Remove(f.Name()))
	}
	return syncDir(dir)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errclass.Join(d.Sync(), d.Close())
}
