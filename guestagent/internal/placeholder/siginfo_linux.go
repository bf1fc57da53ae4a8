// SPDX-License-Identifier: Apache-2.0

package placeholder

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfoPID reads si_pid of a siginfo_t as waitid fills it: on 64-bit systems
// the union begins at byte 16, with si_pid first (sigaction(2),
// asm-generic/siginfo.h). Package unix gives no name to it.
func siginfoPID(info *unix.Siginfo) int {
	raw := (*[unsafe.Sizeof(*info)]byte)(unsafe.Pointer(info))
	return int(int32(binary.NativeEndian.Uint32(raw[16:20]))) //nolint:gosec // a pid fits
}
