// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
)

// NamespaceSuffix is the suffix of the files that [NoteNamespace] writes next
// to the logs, named by machine.
const NamespaceSuffix = ".netns"

// NoteNamespace adds the paths of the calling thread's network namespace to a
// file in dir. A killed shim leaves an empty file at the path of the namespace
// that it created; only a process that ran in it can tell whose it was.
func NoteNamespace(dir, machine string) error {
	namespace, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("record the network namespace: %w", err)
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.FSType != "nsfs" || m.Root != namespace, false })
	if err != nil {
		return fmt.Errorf("record the network namespace: %w", err)
	}
	if len(mounts) == 0 {
		return nil // the host's own
	}
	f, err := os.OpenFile(filepath.Join(dir, machine+NamespaceSuffix), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("record the network namespace: %w", err)
	}
	defer f.Close()
	for _, m := range mounts {
		if _, err := fmt.Fprintln(f, m.Mountpoint); err != nil {
			return fmt.Errorf("record the network namespace: %w", err)
		}
	}
	return f.Close()
}
