// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// unfinishedDir is below the state directory. It has a link to each unfinished
// image set: bundles, which have a note of it, too, are in memory and gone after
// a power loss, and a link is on the disk as soon as its name is.
const unfinishedDir = "unfinished"

// UnfinishedDir is the directory with the notes of NoteUnfinished.
func UnfinishedDir(stateDir string) string { return filepath.Join(stateDir, unfinishedDir) }

// NoteUnfinished notes an unfinished image set for [RemoveUnfinished]. The caller
// removes the note once it is finished.
func NoteUnfinished(stateDir, path string) (note string, err error) {
	dir := UnfinishedDir(stateDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	note = filepath.Join(dir, rand.Text())
	return note, os.Symlink(path, note)
}

// RemoveUnfinished removes all image sets that were noted in a state directory and
// not finished. Nobody may be writing any.
func RemoveUnfinished(stateDir string) error {
	dir := UnfinishedDir(stateDir)
	notes, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, n := range notes {
		note := filepath.Join(dir, n.Name())
		path, linkErr := os.Readlink(note)
		if linkErr == nil && imageset.IsStaging(path) {
			linkErr = imageset.RemoveStaging(path)
		}
		if linkErr == nil {
			linkErr = os.Remove(note)
		}
		err = errclass.Join(err, linkErr)
	}
	return err
}
