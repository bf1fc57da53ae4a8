// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// RecordName is our file in the bundle. Kata's are address, shim.pid and
// monitor_address, containerd's bootstrap.json and shim-binary-path.
const RecordName = "kata-checkpoint.json"

// Record is what an invocation of the shim's binary leaves for the next one:
// the daemon and `delete` use what `start` has decided, whatever config.toml
// has become since.
type Record struct {
	// Sandbox is the id of the container that holds the VM; in its own bundle
	// it is the container's id.
	Sandbox string `json:"sandbox"`
	// Downstream is where Kata's shim serves.
	Downstream kata.Endpoint `json:"downstream"`
	// DownstreamShim is the binary that was started.
	DownstreamShim string `json:"downstreamShim"`
	// Address is where our daemon serves.
	Address string `json:"address"`
	// Events is the socket on which our daemon receives Kata's events.
	Events   string `json:"events"`
	StateDir string `json:"stateDir"`
	// PID and StartTime are those of our daemon, and empty for a container that
	// shares another one's.
	PID int `json:"pid,omitempty"`
	// StartTime is in clock ticks after boot, as in /proc/PID/stat.
	StartTime uint64 `json:"startTime,omitempty"`
}

// ReadRecord reads the record in a bundle directory. Without a record it
// returns an error that wraps [fs.ErrNotExist].
func ReadRecord(dir string) (*Record, error) {
	path := filepath.Join(dir, RecordName)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the shim's record: %w", err)
	}
	r := &Record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("read the shim's record %s: %w", path, err)
	}
	return r, nil
}

// Write puts the record into a bundle directory.
func (r *Record) Write(dir string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write the shim's record: %w", err)
	}
	return replaceFile(filepath.Join(dir, RecordName), append(data, '\n'))
}

// RemoveRecord removes the record from a bundle directory.
func RemoveRecord(dir string) error {
	err := os.Remove(filepath.Join(dir, RecordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
