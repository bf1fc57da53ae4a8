// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/share"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// record is what a later process needs to clean up after a dead shim.
type record struct {
	Processes []started `json:"processes"`
}

// started identifies a process by its pid and start time.
type started struct {
	Pid int `json:"pid"`
	// Start is in clock ticks since the machine's boot.
	Start string `json:"start"`
}

func recordPath(w way.Way, id string) string {
	if w == way.Rust {
		return filepath.Join(w.StateDir(id), "state.json")
	}
	return filepath.Join(w.StateDir(id), "persist.json")
}

func (s *Sandbox) record() error {
	var r record
	for _, pid := range []int{s.vm.Pid(), s.vm.VirtiofsdPid()} {
		start, err := startOf(pid)
		if err != nil {
			return fmt.Errorf("record the sandbox's processes: %w", err)
		}
		r.Processes = append(r.Processes, started{pid, start})
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := recordPath(s.config.Way, s.ID)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return fmt.Errorf("record the sandbox's processes: %w", err)
	}
	return os.WriteFile(path, raw, 0o600)
}

// startOf returns field 22 of /proc/PID/stat; the name before it may contain
// anything.
func startOf(pid int) (string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	text := string(raw)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return "", fmt.Errorf("stat of %d: %q", pid, text)
	}
	return fields[19], nil
}

// RemoveRemains kills and removes what a dead shim left of a sandbox. The
// mounts disappeared with the shim's namespace; their mount points are empty.
func RemoveRemains(w way.Way, id string) error {
	var failures []error
	var r record
	raw, err := os.ReadFile(recordPath(w, id))
	if err == nil {
		err = json.Unmarshal(raw, &r)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		failures = append(failures, err)
	}
	for _, p := range r.Processes {
		if start, err := startOf(p.Pid); err == nil && start == p.Start {
			failures = append(failures, syscall.Kill(-p.Pid, syscall.SIGKILL))
		}
	}
	// The namespace disappeared with the shim; an empty file is left.
	if err := os.Remove(netns.Path(id)); !errors.Is(err, os.ErrNotExist) {
		failures = append(failures, err)
	}
	failures = append(failures, share.RemoveTree(way.ShareDir(id)), os.RemoveAll(w.VMDir(id)), os.RemoveAll(w.StateDir(id)))
	if err := errors.Join(failures...); err != nil {
		return fmt.Errorf("remove what is left of sandbox %s: %w", id, err)
	}
	return nil
}
