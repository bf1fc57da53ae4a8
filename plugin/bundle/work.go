package bundle

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// CRIWorkPath is where the CRI looks for CRIU's log and statistics after a
// checkpoint, empty if that cannot be told: the directory ctrd-checkpoint of
// its container where it makes one, the container's directory for versions
// that want stats-dump there (containerd before 2.1.9, 2.2.5 and 2.3.2).
func CRIWorkPath(dir string) string {
	// The link is to <root>/io.containerd.runtime.v2.task/<namespace>/<id>.
	work, err := os.Readlink(filepath.Join(dir, "work"))
	if err != nil {
		return ""
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(work)))
	container := filepath.Join(root, "io.containerd.grpc.v1.cri", "containers", filepath.Base(work))
	for _, d := range []string{filepath.Join(container, "ctrd-checkpoint"), container} {
		if st, err := os.Stat(d); err == nil && st.IsDir() {
			return d
		}
	}
	return ""
}

// stagingName is our file in the bundle that names an unfinished image set.
const stagingName = "kata-checkpoint.staging"

// SetStaging notes where an unfinished image set is, or that there is none.
func SetStaging(dir, path string) error {
	note := filepath.Join(dir, stagingName)
	if path != "" {
		return replaceFile(note, []byte(path))
	}
	if err := os.Remove(note); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// RemoveStaging removes an unfinished image set that was noted.
func RemoveStaging(dir string) error {
	path, err := os.ReadFile(filepath.Join(dir, stagingName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return imageset.RemoveStaging(string(path))
}
