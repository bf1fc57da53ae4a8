// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vmm"
)

// kataNamespace is the prefix of the network namespaces that Kata's shims
// create.
const kataNamespace = "cnitest-"

// removeNetworkNamespaces removes the names of network namespaces that the
// testbed's shims left behind: the mount of a killed shim disappears with its
// mount namespace, but the file stays. Call it when no process of the testbed
// is left. Namespaces of other testbeds and of engines stay.
func (t *Testbed) removeNetworkNamespaces() error {
	left, err := t.networkNamespaces()
	if err != nil || len(left) == 0 {
		return err
	}
	inUse, err := mountedAnywhere()
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range left {
		if inUse[path] {
			continue // of a sandbox with the same name in another testbed
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove a network namespace's name: %w", err))
		}
	}
	return errors.Join(errs...)
}

// networkNamespaces lists the existing namespaces that the testbed's shims
// created for its VMs.
func (t *Testbed) networkNamespaces() ([]string, error) {
	notes, err := filepath.Glob(filepath.Join(t.logDir(), "*"+vmm.NamespaceSuffix))
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var out []string
	for _, note := range notes {
		data, err := os.ReadFile(note)
		if err != nil {
			return nil, fmt.Errorf("list network namespaces: %w", err)
		}
		own := filepath.Base(netns.Path(strings.TrimSuffix(filepath.Base(note), vmm.NamespaceSuffix)))
		for path := range strings.Lines(string(data)) {
			path = strings.TrimSuffix(path, "\n")
			name := filepath.Base(path)
			if name != own && !strings.HasPrefix(name, kataNamespace) {
				continue // the engine's
			}
			if _, err := os.Lstat(path); err == nil {
				out = append(out, path)
			}
		}
	}
	return out, nil
}

// mountedAnywhere lists the mount points of the mount namespaces of all
// processes.
func mountedAnywhere() (map[string]bool, error) {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	out, seen := map[string]bool{}, map[string]bool{}
	for _, dir := range processes {
		namespace, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil || seen[namespace] {
			continue
		}
		seen[namespace] = true
		all, err := mountsOf(filepath.Join(dir, "mountinfo"))
		if err != nil {
			seen[namespace] = false // it exited meanwhile; another process may be in the namespace
			continue
		}
		for _, m := range all {
			out[m.path] = true
		}
	}
	return out, nil
}
