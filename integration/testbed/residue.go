// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Residue lists, in words, what removed containers have left behind: processes
// other than containerd, mounts, bundles and sandboxes with their names, files
// in the product's state directory, and unpacked checkpoints. In a testbed
// without containers there should be none.
//
// What Kata itself leaves behind is not listed: its shims' sockets and empty
// cgroups.
func (t *Testbed) Residue(containers ...string) ([]string, error) {
	processes, err := t.owned()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range processes {
		if p == t.Containerd || t.CRI != nil && p == t.CRI.NRI {
			continue
		}
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		out = append(out, fmt.Sprintf("process %d: %s", p.PID, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
	}
	all, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if strings.HasPrefix(m.path, t.Dir+"/") || slices.ContainsFunc(strings.Split(m.path, "/"), func(name string) bool {
			return slices.Contains(containers, name)
		}) {
			out = append(out, "mount "+m.path)
		}
	}
	patterns := []string{
		"run/io.containerd.runtime.v2.task/*/*", "root/io.containerd.runtime.v2.task/*/*", "state/*/*", "tmp/ctrd-checkpoint*",
	}
	for i, p := range patterns {
		patterns[i] = filepath.Join(t.Dir, p)
	}
	for _, id := range containers {
		for _, dir := range sandboxDirs(id) {
			if !strings.HasSuffix(dir, ".pid") { // of the testbed's own virtiofsd
				patterns = append(patterns, dir)
			}
		}
	}
	for _, p := range patterns {
		found, _ := filepath.Glob(p)
		for _, path := range found {
			switch filepath.Dir(path) {
			case filepath.Join(t.Dir, "state/restored"): // records of pods that may get another sandbox
				continue
			case filepath.Join(t.Dir, "state/restore-logs"): // the last ones, of CRIU
				continue
			}
			out = append(out, "file "+path)
		}
	}
	return out, nil
}

// Exchanged lists the files in the exchange directories of the running
// containers that match a pattern.
func (t *Testbed) Exchanged(pattern string) ([]string, error) {
	return filepath.Glob(filepath.Join(t.Dir, "state/*/*", pattern))
}
