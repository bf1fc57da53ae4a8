// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// unfinishedDir is below the state directory. For each container of which a
// checkpoint is in progress it has a link to the unfinished image set. Bundles are
// in memory and gone after a power loss; a link is on the disk as soon as its
// name is.
const unfinishedDir = "unfinished"

// UnfinishedDir is the directory with the links of SetUnfinished.
func UnfinishedDir(stateDir string) string { return filepath.Join(stateDir, unfinishedDir) }

// SetUnfinished notes where an unfinished image set of a container is, or, if path
// is empty, that there is none.
func SetUnfinished(stateDir, namespace, id, path string) error {
	link := unfinishedLink(stateDir, namespace, id)
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
		return err
	}
	return os.Symlink(path, link)
}

// RemoveUnfinished removes the unfinished image set of a container whose shim is
// gone, and the note of it.
func RemoveUnfinished(stateDir, namespace, id string) error {
	return removeUnfinished(unfinishedLink(stateDir, namespace, id))
}

// RemoveAllUnfinished removes all image sets that were noted in a state directory
// and not finished. Nobody may be writing any.
func RemoveAllUnfinished(stateDir string) error {
	links, err := filepath.Glob(unfinishedLink(stateDir, "*", "*"))
	for _, link := range links {
		err = errclass.Join(err, removeUnfinished(link))
	}
	return err
}

// unfinishedLink is the link of a container. No identifier of containerd's has two
// hyphens in a row.
func unfinishedLink(stateDir, namespace, id string) string {
	return filepath.Join(UnfinishedDir(stateDir), namespace+"--"+id)
}

func removeUnfinished(link string) error {
	path, err := os.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := imageset.RemoveStaging(path); err != nil {
		return err
	}
	return os.Remove(link)
}
