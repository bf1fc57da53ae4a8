package vmm

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/sys/mountinfo"
)

// NamespaceSuffix is that of the files beside the logs with what
// [NoteNamespace] has noted, named after their machines.
const NamespaceSuffix = ".netns"

// NoteNamespace adds the names of the network namespace that the calling thread
// is in to a file in dir. A shim that is killed leaves the name of the one that
// it made, as an empty file with a name that tells nothing: only who ran in it
// knows whose it was.
func NoteNamespace(dir, machine string) error {
	namespace, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("note the network namespace: %w", err)
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.FSType != "nsfs" || m.Root != namespace, false })
	if err != nil {
		return fmt.Errorf("note the network namespace: %w", err)
	}
	if len(mounts) == 0 {
		return nil // the machine's own
	}
	f, err := os.OpenFile(filepath.Join(dir, machine+NamespaceSuffix), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("note the network namespace: %w", err)
	}
	defer f.Close()
	for _, m := range mounts {
		if _, err := fmt.Fprintln(f, m.Mountpoint); err != nil {
			return fmt.Errorf("note the network namespace: %w", err)
		}
	}
	return f.Close()
}
