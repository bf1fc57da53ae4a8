// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Nobody is charged for what the agent keeps, as the logs of CRIU: it is bounded,
// and what is on its mount gives no rights.
func TestTheAgentsMemoryIsBounded(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	a := &Agent{dir: filepath.Join(t.TempDir(), "state")}
	if err := a.prepare(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(a.dir, 0); err != nil {
			t.Error(err)
		}
	}()
	var st unix.Statfs_t
	if err := unix.Statfs(a.dir, &st); err != nil {
		t.Fatal(err)
	}
	if size := st.Blocks * uint64(st.Bsize); size > maxState || size < 32<<20 {
		t.Errorf("it has a size of %d bytes", size)
	}
	if st.Flags&unix.ST_NODEV == 0 || st.Flags&unix.ST_NOSUID == 0 {
		t.Errorf("flags %#x", st.Flags)
	}
	// The next agent finds it.
	if err := a.prepare(); err != nil {
		t.Error(err)
	}
}
