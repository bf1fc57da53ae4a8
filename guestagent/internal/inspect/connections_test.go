package inspect

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	const tables = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0000000000000000 100 0 0 10 0
   1: 0200000A:1F90 0100000A:C350 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0000000000000000 20 4 30 10 -1
   2: 0200000A:1F90 0100000A:C351 01 00000000:00000000 00:00000000 00000000     0        0 99 1 0000000000000000 20 4 30 10 -1
   3: 0200000A:1F90 0100000A:C352 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0000000000000000
   4: 0000000000000000FFFF00000200000A:1F90 0000000000000000FFFF00000100000A:C353 08 00000000:00000000 00:00000000 00000000 0 0 13 1 0
   5: B80D01200000000000000000010000FE:0050 B80D01200000000000000000020000FE:0051 02 00000000:00000000 00:00000000 00000000 0 0 14 1 0
`
	holders := map[uint64]Connection{0: {PID: 9, FD: 9}, 11: {PID: 1, FD: 3}, 12: {PID: 1, FD: 4}, 13: {PID: 2, FD: 5}, 14: {PID: 2, FD: 6}}
	got, err := parse(strings.NewReader(tables), holders)
	if err != nil {
		t.Fatal(err)
	}
	want := []Connection{
		{1, 4, netip.MustParseAddrPort("10.0.0.2:8080"), netip.MustParseAddrPort("10.0.0.1:50000")},
		{2, 5, netip.MustParseAddrPort("10.0.0.2:8080"), netip.MustParseAddrPort("10.0.0.1:50003")},
		{2, 6, netip.MustParseAddrPort("[2001:db8::fe00:1]:80"), netip.MustParseAddrPort("[2001:db8::fe00:2]:81")},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	for _, line := range []string{"0: 1 2 01", "0: 0100007F:1F90 0100007F:1F90 01 0 0 0 0 0 x", "0: 7F:1F90 0100007F:1F90 01 0 0 0 0 0 12", "0: 0100007F 0100007F:1F90 01 0 0 0 0 0 12"} {
		if got, err := parse(strings.NewReader("head\n"+line+"\n"), holders); err == nil {
			t.Errorf("%q is %v", line, got)
		}
	}
}

func TestList(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	found := func(c net.Conn) bool {
		list, err := Connections([]int{os.Getpid()})
		if err != nil {
			t.Fatal(err)
		}
		for _, have := range list {
			if have.Local.String() == c.LocalAddr().String() && have.Remote.String() == c.RemoteAddr().String() {
				return true
			}
			if have.Local.String() == l.Addr().String() && !have.Remote.IsValid() {
				t.Errorf("a listening socket is %v", have)
			}
		}
		return false
	}
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if !found(c) {
		t.Error("an open connection is not found")
	}
	c.Close()
	if found(c) {
		t.Error("a closed connection is found")
	}
}
