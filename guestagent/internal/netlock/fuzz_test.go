// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"net/netip"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// Each connection is an element of the set of its family, of that set's length.
func FuzzKeys(f *testing.F) {
	f.Add([]byte{192, 0, 2, 1}, []byte{198, 51, 100, 1}, uint16(80), uint16(65535))
	f.Add(make([]byte, 16), make([]byte, 16), uint16(0), uint16(1))
	f.Fuzz(func(t *testing.T, local, remote []byte, a, b uint16) {
		l, ok := netip.AddrFromSlice(local)
		if !ok {
			return
		}
		r, ok := netip.AddrFromSlice(remote)
		if !ok || l.BitLen() != r.BitLen() {
			return
		}
		list := []inspect.Connection{{Local: netip.AddrPortFrom(l, a), Remote: netip.AddrPortFrom(r, b)}}
		n := 0
		for _, family := range families {
			for _, e := range family.keys(list) {
				n++
				if want := int(2*family.length + 8); len(e.Key) != want {
					t.Errorf("%s: %d bytes, not %d", family.name, len(e.Key), want)
				}
			}
		}
		if n != 1 {
			t.Errorf("%v is in %d sets", list, n)
		}
	})
}
