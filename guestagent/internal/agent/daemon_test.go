// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestSmallPages(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/mm/transparent_hugepage"); err != nil {
		t.Skip("this kernel has no huge pages: ", err)
	}
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil { // as the hook does
		t.Fatal(err)
	}
	heap := make([]byte, 64<<10)
	if err := smallPages(); err != nil {
		t.Fatal(err)
	}
	if disabled, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0); err != nil || disabled != 0 {
		t.Errorf("what the agent starts inherits a %d (%v)", disabled, err)
	}
	if flags := flagsOf(t, uintptr(unsafe.Pointer(&heap[0]))); !strings.Contains(flags, " nh") {
		t.Errorf("the heap may have huge pages: flags %q", flags)
	}
}

// flagsOf returns the VmFlags of the mapping that an address is in, see
// proc_pid_smaps(5).
func flagsOf(t *testing.T, address uintptr) string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for line := range strings.Lines(string(smaps)) {
		var begin, end uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &begin, &end); n == 2 {
			found = begin <= address && address < end
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && found {
			return flags
		}
	}
	t.Fatalf("nothing is mapped at %x", address)
	return ""
}
