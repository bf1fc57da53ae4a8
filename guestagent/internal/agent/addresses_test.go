// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// interfaces are addresses, each as INTERFACE=ADDRESS.
func interfaces(list ...string) (out []inspect.Address) {
	for _, s := range list {
		name, addr, _ := strings.Cut(s, "=")
		out = append(out, inspect.NewAddress(name, netip.MustParseAddr(addr)))
	}
	return out
}

func TestMovedAddresses(t *testing.T) {
	type list = []string
	for name, tc := range map[string]struct {
		old, now list
		want     map[string]string
	}{
		"another address":               {list{"eth0=10.0.0.2"}, list{"eth0=10.0.0.3"}, map[string]string{"10.0.0.2": "10.0.0.3"}},
		"the same one":                  {list{"eth0=10.0.0.2"}, list{"eth0=10.0.0.2"}, nil},
		"the same one elsewhere":        {list{"eth0=10.0.0.2"}, list{"eth0=10.0.0.3", "eth1=10.0.0.2"}, nil},
		"one of them stays":             {list{"eth0=10.0.0.2", "eth0=10.0.0.9"}, list{"eth0=10.0.0.9", "eth0=10.0.0.3"}, map[string]string{"10.0.0.2": "10.0.0.3"}},
		"two interfaces":                {list{"eth0=10.0.0.2", "net1=192.0.2.2"}, list{"net1=192.0.2.3", "eth0=10.0.0.3"}, map[string]string{"10.0.0.2": "10.0.0.3", "192.0.2.2": "192.0.2.3"}},
		"an interface of another name":  {list{"eth0=10.0.0.2"}, list{"ens3=10.0.0.3"}, map[string]string{"10.0.0.2": "10.0.0.3"}},
		"two of other names":            {list{"eth0=10.0.0.2"}, list{"ens3=10.0.0.3", "ens4=10.0.0.4"}, map[string]string{"10.0.0.2": ""}},
		"several on an interface":       {list{"eth0=10.0.0.2", "eth0=10.0.0.3"}, list{"eth0=10.1.0.2", "eth0=10.1.0.3"}, map[string]string{"10.0.0.2": "10.1.0.2", "10.0.0.3": "10.1.0.3"}},
		"one that was added to it":      {list{"eth0=10.0.0.2", "eth0=10.0.0.100"}, list{"eth0=10.1.0.2"}, map[string]string{"10.0.0.2": "10.1.0.2", "10.0.0.100": ""}},
		"no interface":                  {list{"eth0=10.0.0.2"}, nil, map[string]string{"10.0.0.2": ""}},
		"both families":                 {list{"eth0=10.0.0.2", "eth0=2001:db8::2"}, list{"eth0=2001:db8::3", "eth0=10.0.0.3"}, map[string]string{"10.0.0.2": "10.0.0.3", "2001:db8::2": "2001:db8::3"}},
		"the other family only":         {list{"eth0=10.0.0.2"}, list{"eth0=2001:db8::3"}, map[string]string{"10.0.0.2": ""}},
		"link-local":                    {list{"eth0=2001:db8::2", "eth0=fe80::2"}, list{"eth0=fe80::3", "eth0=2001:db8::3"}, map[string]string{"2001:db8::2": "2001:db8::3", "fe80::2%eth0": "fe80::3%eth0"}},
		"link-local, another interface": {list{"eth0=fe80::2"}, list{"ens3=fe80::2"}, map[string]string{"fe80::2%eth0": ""}},
		"an image set without any":      {nil, list{"eth0=10.0.0.3"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var got map[string]string
			for from, to := range movedAddresses(interfaces(tc.old...), interfaces(tc.now...)) {
				if got == nil {
					got = make(map[string]string)
				}
				got[from.String()] = ""
				if to.IsValid() {
					got[from.String()] = to.String()
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// words are an address as CRIU writes it.
func words(addr string) (out []uint32) {
	data := netip.MustParseAddr(addr).AsSlice()
	for ; len(data) > 0; data = data[4:] {
		out = append(out, binary.NativeEndian.Uint32(data))
	}
	return out
}

type socket struct {
	kind, protocol uint32
	local, remote  string // ADDRESS:PORT
	iface          string
}

func (s socket) entry(id uint32) *fdinfo.FileEntry {
	local, remote := netip.MustParseAddrPort(s.local), netip.MustParseAddrPort(s.remote)
	family := uint32(unix.AF_INET)
	if local.Addr().Is6() {
		family = unix.AF_INET6
	}
	zero := proto.Uint32(0)
	e := &sk_inet.InetSkEntry{
		Id: &id, Ino: proto.Uint32(1000 + id), Family: &family, Type: &s.kind, Proto: &s.protocol, State: proto.Uint32(7),
		SrcPort: proto.Uint32(uint32(local.Port())), DstPort: proto.Uint32(uint32(remote.Port())), Flags: zero, Backlog: zero,
		SrcAddr: words(local.Addr().String()), DstAddr: words(remote.Addr().String()),
		Fown: &fown.FownEntry{Uid: zero, Euid: zero, Signum: zero, PidType: zero, Pid: zero},
		Opts: &sk_opts.SkOptsEntry{SoSndbuf: proto.Uint32(4096), SoRcvbuf: proto.Uint32(4096), SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0), SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)},
	}
	if s.iface != "" {
		e.Ifname = &s.iface
	}
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: &id, Isk: e}
}

// writeFiles writes an image as CRIU's own library does.
func writeFiles(t *testing.T, dir string, entries ...*fdinfo.FileEntry) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, filesImage), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	image := &crit.CriuImage{Magic: "FILES"}
	for _, e := range entries {
		image.Entries = append(image.Entries, &crit.CriuEntry{Message: e})
	}
	if err := crit.New(nil, f, "", false, false).Encode(image); err != nil {
		t.Fatal(err)
	}
}

func readFiles(t *testing.T, dir string) (out []*fdinfo.FileEntry) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, filesImage))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	image, err := crit.New(f, nil, "", false, false).Decode(&fdinfo.FileEntry{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range image.Entries {
		out = append(out, e.Message.(*fdinfo.FileEntry))
	}
	return out
}

func TestSocketsMove(t *testing.T) {
	moves := &readdressing{moved: movedAddresses(
		interfaces("eth0=10.0.0.2", "eth0=2001:db8::2", "eth0=fe80::2"), interfaces("eth0=10.0.0.3", "eth0=2001:db8::3", "eth0=fe80::3"))}
	tcp := func(local, remote string) socket {
		return socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, local, remote, ""}
	}
	udp := func(local, remote string) socket { return socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, local, remote, ""} }
	nobody, nobody6 := "0.0.0.0:0", "[::]:0"
	linkLocal := func(addr, iface string) socket {
		return socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, "[" + addr + "]:53", nobody6, iface}
	}
	for name, tc := range map[string]struct{ from, to socket }{
		"TCP listener":                   {tcp("10.0.0.2:80", nobody), tcp("10.0.0.3:80", nobody)},
		"UDP server":                     {udp("10.0.0.2:53", nobody), udp("10.0.0.3:53", nobody)},
		"connected UDP":                  {udp("10.0.0.2:4000", "10.0.0.1:8125"), udp("10.0.0.3:4000", "10.0.0.1:8125")},
		"UDP, connected to its own":      {udp("10.0.0.2:4000", "10.0.0.2:53"), udp("10.0.0.3:4000", "10.0.0.3:53")},
		"raw":                            {socket{unix.SOCK_RAW, unix.IPPROTO_SCTP, "10.0.0.2:132", nobody, ""}, socket{unix.SOCK_RAW, unix.IPPROTO_SCTP, "10.0.0.3:132", nobody, ""}},
		"IPv6":                           {tcp("[2001:db8::2]:80", nobody6), tcp("[2001:db8::3]:80", nobody6)},
		"mapped IPv4":                    {tcp("[::ffff:10.0.0.2]:80", nobody6), tcp("[::ffff:10.0.0.3]:80", nobody6)},
		"link-local":                     {linkLocal("fe80::2", "eth0"), linkLocal("fe80::3", "eth0")},
		"link-local, other interface":    {linkLocal("fe80::2", "eth1"), linkLocal("fe80::2", "eth1")},
		"connection inside":              {tcp("10.0.0.2:80", "10.0.0.2:4000"), tcp("10.0.0.3:80", "10.0.0.3:4000")},
		"wildcard":                       {tcp("0.0.0.0:80", nobody), tcp("0.0.0.0:80", nobody)},
		"wildcard of IPv6":               {tcp("[::]:80", nobody6), tcp("[::]:80", nobody6)},
		"loopback":                       {tcp("127.0.0.1:80", nobody), tcp("127.0.0.1:80", nobody)},
		"an address that nobody had":     {udp("192.0.2.7:53", nobody), udp("192.0.2.7:53", nobody)},
		"connection inside, by loopback": {tcp("127.0.0.1:80", "127.0.0.1:4000"), tcp("127.0.0.1:80", "127.0.0.1:4000")},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeFiles(t, dir, tc.from.entry(7))
			if err := moves.check(dir); err != nil {
				t.Fatal(err)
			}
			if got := readFiles(t, dir); !proto.Equal(got[0], tc.from.entry(7)) {
				t.Errorf("the check has changed it to %v", got)
			}
			n, err := moves.apply(dir)
			if err != nil {
				t.Fatal(err)
			}
			if want := map[bool]int{true: 0, false: 1}[tc.from == tc.to]; n != want {
				t.Errorf("changed %d, not %d", n, want)
			}
			if got := readFiles(t, dir); len(got) != 1 || !proto.Equal(got[0], tc.to.entry(7)) {
				t.Errorf("got %v, want %v", got, tc.to.entry(7))
			}
		})
	}
}

func TestSocketsThatCannotMove(t *testing.T) {
	const nobody = "0.0.0.0:0"
	udp := socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, "10.0.0.2:53", nobody, ""}
	connection := socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, "10.0.0.2:4000", "10.0.0.1:5432", ""}
	mapped := socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, "[::ffff:10.0.0.2]:4000", "[::ffff:10.0.0.1]:5432", ""}
	outside := []inspect.Connection{{Local: netip.MustParseAddrPort("10.0.0.2:4000"), Remote: netip.MustParseAddrPort("10.0.0.1:5432")}}
	here, elsewhere, nowhere := interfaces("eth0=10.0.0.2"), interfaces("eth0=10.0.0.3"), interfaces("eth0=2001:db8::3")
	for name, tc := range map[string]struct {
		socket  socket
		now     []inspect.Address
		outside []inspect.Connection
		closed  bool
		err     string
	}{
		"no address of the family":    {udp, nowhere, nil, false, "its UDP socket is bound to its own address 10.0.0.2:53"},
		"connected to such":           {socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, "0.0.0.0:53", "10.0.0.2:4000", ""}, nowhere, nil, false, "connected to its own address 10.0.0.2:4000"},
		"a connection to outside":     {connection, elsewhere, outside, false, "from 10.0.0.2:4000 to 10.0.0.1:5432"},
		"the same, over IPv6":         {mapped, elsewhere, outside, false, "from 10.0.0.2:4000 to 10.0.0.1:5432"},
		"at the same address":         {connection, here, outside, false, ""},
		"connections are closed":      {connection, elsewhere, nil, true, ""},
		"closed, without an address":  {connection, nowhere, nil, true, ""},
		"nothing is bound":            {socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, nobody, nobody, ""}, nowhere, nil, false, ""},
		"a datagram of that endpoint": {socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, connection.local, connection.remote, ""}, elsewhere, outside, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeFiles(t, dir, tc.socket.entry(1))
			before, err := os.ReadFile(filepath.Join(dir, filesImage))
			if err != nil {
				t.Fatal(err)
			}
			moves := &readdressing{moved: movedAddresses(here, tc.now), outside: tc.outside, closed: tc.closed}
			err = moves.check(dir)
			if tc.err == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("the check returns %v, want %q", err, tc.err)
			}
			if _, err := moves.apply(dir); err == nil {
				t.Error("applied")
			}
			after, err := os.ReadFile(filepath.Join(dir, filesImage))
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("the image has changed: %v", err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
				t.Errorf("left %v, %v", left, err)
			}
		})
	}
}

// What is not a socket that moves stays what it was byte for byte, fields of a
// newer CRIU included, and so do the image's mode and name.
func TestOtherEntriesStayAsTheyWere(t *testing.T) {
	zero := proto.Uint32(0)
	file := func(id uint32, name string) *fdinfo.FileEntry {
		reg := &regfile.RegFileEntry{Id: &id, Flags: zero, Pos: proto.Uint64(5), Name: &name, Fown: &fown.FownEntry{Uid: zero, Euid: zero, Signum: zero, PidType: zero, Pid: zero}}
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: &id, Reg: reg}
	}
	newer := file(3, "/data/newer")
	newer.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 999, protowire.BytesType), "of a newer CRIU"))
	moving := socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, "10.0.0.2:53", "0.0.0.0:0", ""}.entry(2)
	moving.Isk.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 998, protowire.VarintType), 42))
	dir := t.TempDir()
	writeFiles(t, dir, file(1, "/data/log"), moving, newer)
	path := filepath.Join(dir, filesImage)
	if err := os.Chmod(path, 0o604); err != nil { // whatever the umask
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	moves := &readdressing{moved: movedAddresses(interfaces("eth0=10.0.0.2"), interfaces("eth0=10.0.0.3"))}
	if n, err := moves.apply(dir); err != nil || n != 1 {
		t.Fatalf("changed %d, %v", n, err)
	}
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Both addresses have four bytes, of which one differs.
	var differ []int
	for i := range before {
		if len(after) != len(before) || before[i] != after[i] {
			differ = append(differ, i)
		}
	}
	if len(before) != len(after) || len(differ) != 1 {
		t.Errorf("of %d and %d bytes, these differ: %v", len(before), len(after), differ)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode() != 0o604 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	// Once more changes nothing, as after a restore that failed.
	if n, err := moves.apply(dir); err != nil || n != 0 {
		t.Errorf("changed %d again, %v", n, err)
	}
}

func TestFilesThatAreNoImageOfFiles(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, "10.0.0.2:53", "0.0.0.0:0", ""}.entry(1))
	path := filepath.Join(dir, filesImage)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	moves := &readdressing{moved: movedAddresses(interfaces("eth0=10.0.0.2"), interfaces("eth0=10.0.0.3"))}
	for name, data := range map[string][]byte{
		"empty": nil, "cut short": good[:len(good)-1], "a size cut short": append(bytes.Clone(good), 1, 0), "another image": append([]byte{1}, good[1:]...),
		"an endless entry": append(bytes.Clone(good), 0xff, 0xff, 0xff, 0x7f), "no message": append(bytes.Clone(good), 1, 0, 0, 0, 0xff),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := moves.check(dir); err == nil || !strings.Contains(err.Error(), "files.img") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
