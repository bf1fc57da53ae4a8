// SPDX-License-Identifier: Apache-2.0

package sockopt

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// The first thread is what /proc/self shows. It is the main goroutine's, so
// that no test leaves it in another network namespace.
func init() { runtime.LockOSThread() }

// inNetworkNamespace runs a test on a thread with a network of its own.
func inNetworkNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes a network namespace: only as root")
	}
	runtime.LockOSThread() // never unlocked: the thread exits with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

func newSocket(t *testing.T, k kind) int {
	t.Helper()
	fd, err := unix.Socket(k.domain, k.sort|unix.SOCK_CLOEXEC, k.protocol)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// own is a descriptor of the test's.
func own(fd int) inspect.Descriptor { return inspect.Descriptor{PID: os.Getpid(), Inner: 7, FD: fd} }

// restoreTo sets what was read of one socket at another one.
func restoreTo(t *testing.T, fd int, sockets []*api.Socket) {
	t.Helper()
	for _, s := range sockets {
		s = proto.CloneOf(s)
		s.Fd = int32(fd)
		for _, err := range Restore([]*api.Socket{s}, map[int]int{7: os.Getpid()}) {
			t.Error(err)
		}
	}
}

var kinds = map[string]kind{
	"TCP":           {unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP},
	"TCP over IPv6": {unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP},
	"UDP":           {unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDP},
	"UDP over IPv6": {unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_UDP},
	"raw":           {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP},
	"raw IPv6":      {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6},
}

// Each option of each kind of socket comes back. A new socket has nothing to
// bring back.
func TestOptionsComeBack(t *testing.T) {
	inNetworkNamespace(t)
	changed := make(map[string]bool)
	for name, k := range kinds {
		plain := newSocket(t, k)
		if list, err := Read([]inspect.Descriptor{own(plain)}); err != nil || len(list) > 0 {
			t.Errorf("%s: of a new socket: %v, %v", name, list, err)
		}
		for _, o := range options {
			fd := newSocket(t, k)
			before, ok := o.get(fd)
			if !ok {
				continue
			}
			candidates := []value{{number: 1}, {number: 0}, {number: 2}, {number: 5}, {number: 1200}}
			switch o.format {
			case algorithm:
				candidates = nil
				allowed, err := os.ReadFile(allowedAlgorithms)
				if err != nil {
					t.Fatal(err)
				}
				for text := range strings.FieldsSeq(string(allowed)) {
					candidates = append(candidates, value{text: text})
				}
			case iface:
				candidates = []value{{text: "lo"}}
			}
			var want value
			if !slices.ContainsFunc(candidates, func(v value) bool {
				if v == before || o.set(fd, v) != nil {
					return false
				}
				want, ok = o.get(fd)
				return ok && want != before
			}) {
				continue // it cannot be set at a socket of this kind
			}
			changed[o.label] = true
			list, err := Read([]inspect.Descriptor{own(plain), own(fd), own(plain)})
			if err != nil || len(list) != 1 || len(list[0].GetMemberships()) > 0 || list[0].GetPid() != 7 || list[0].GetFd() != int32(fd) {
				t.Errorf("%s: %s: %v, %v", name, o.label, list, err)
				continue
			}
			again := newSocket(t, k)
			restoreTo(t, again, list)
			restoreTo(t, again, list) // has no effect
			if have, _ := o.get(again); have != want {
				t.Errorf("%s: %s comes back as %v, not %v", name, o.label, have, want)
			}
		}
	}
	for _, o := range options {
		// One allowed algorithm is none to change to.
		if !changed[o.label] && o.format != algorithm {
			t.Logf("no socket of this kernel's has %s", o.label)
		}
	}
	for _, label := range []string{"TCP_USER_TIMEOUT", "TCP_DEFER_ACCEPT", "TCP_NOTSENT_LOWAT", "IP_RECVERR", "IP_MTU_DISCOVER", "IP_MULTICAST_TTL", "IPV6_MULTICAST_IF", "IPV6_RECVHOPLIMIT", "UDP_GRO", "SO_TIMESTAMP"} {
		if !changed[label] {
			t.Errorf("%s was set at no socket", label)
		}
	}
}

// A socket is again in the multicast groups that it had joined, with their
// sources, and in no other.
func TestMembershipsComeBack(t *testing.T) {
	inNetworkNamespace(t)
	const joined, filtered, other = "239.1.2.3", "232.1.2.3", "239.9.9.9"
	for name, c := range map[string]struct {
		kind
		groups []*api.Membership
		others string
	}{
		"IPv4": {kinds["UDP"], []*api.Membership{
			{Interface: "lo", Group: joined, Exclude: true},
			{Interface: "lo", Group: filtered, Sources: []string{"192.0.2.1", "192.0.2.2"}},
		}, other},
		"all but one source": {kinds["UDP"], []*api.Membership{{Interface: "lo", Group: joined, Exclude: true, Sources: []string{"192.0.2.9"}}}, other},
		"IPv6":               {kinds["UDP over IPv6"], []*api.Membership{{Interface: "lo", Group: "ff02::1234", Exclude: true}, {Interface: "lo", Group: "ff35::1", Sources: []string{"2001:db8::1"}}}, "ff02::77"},
		"IPv4 at IPv6":       {kinds["UDP over IPv6"], []*api.Membership{{Interface: "lo", Group: joined, Exclude: true}}, other},
	} {
		t.Run(name, func(t *testing.T) {
			inNetworkNamespace(t)
			someone := newSocket(t, c.kind)
			if err := join(someone, &api.Membership{Interface: "lo", Group: c.others, Exclude: true}); err != nil {
				t.Fatal(err)
			}
			fd := newSocket(t, c.kind)
			for _, m := range c.groups {
				if err := join(fd, m); err != nil {
					t.Fatalf("join %v: %v", m, err)
				}
			}
			list, err := Read([]inspect.Descriptor{own(fd)})
			if err != nil || len(list) != 1 {
				t.Fatalf("%v, %v", list, err)
			}
			check := func(when string, s *api.Socket) {
				t.Helper()
				have := make(map[string]bool)
				for _, m := range s.GetMemberships() {
					slices.Sort(m.Sources)
					have[fmt.Sprint(m)] = true
				}
				for _, m := range c.groups {
					if !have[fmt.Sprint(m)] {
						t.Errorf("%s %v is missing in %v", when, m, s.GetMemberships())
					}
				}
				if len(have) != len(c.groups) {
					t.Errorf("%s it is in %v", when, s.GetMemberships())
				}
			}
			check("at the dump", list[0])
			again := newSocket(t, c.kind)
			restoreTo(t, again, list)
			restored, err := Read([]inspect.Descriptor{own(again)})
			if err != nil || len(restored) != 1 {
				t.Fatalf("%v, %v", restored, err)
			}
			check("after the restore", restored[0])
		})
	}
}

// What cannot be set is named, and the rest is set.
func TestRestoreNamesWhatFails(t *testing.T) {
	fd := newSocket(t, kinds["TCP"])
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	userTimeout := &api.SocketOption{Level: unix.SOL_TCP, Name: unix.TCP_USER_TIMEOUT, Value: 4321}
	socket := func(fd int, options ...*api.SocketOption) *api.Socket {
		return &api.Socket{Pid: 7, Fd: int32(fd), Options: options}
	}
	for want, s := range map[string]*api.Socket{
		"process 8 is not among":         {Pid: 8, Options: []*api.SocketOption{userTimeout}},
		"descriptor 9999 of process 7":   socket(9999, userTimeout),
		"operation on non-socket":        socket(pipe[0], userTimeout),
		"option 36 of level 1 is unk":    socket(fd, &api.SocketOption{Level: unix.SOL_SOCKET, Name: unix.SO_MARK, Value: 1}, userTimeout),
		"does not have nosuch":           socket(fd, &api.SocketOption{Level: unix.SOL_TCP, Name: unix.TCP_CONGESTION, Text: "nosuch"}, userTimeout),
		"multicast group 239.1.2.3 on x": {Pid: 7, Fd: int32(fd), Options: []*api.SocketOption{userTimeout}, Memberships: []*api.Membership{{Interface: "x", Group: "239.1.2.3"}}},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_USER_TIMEOUT, 0); err != nil {
			t.Fatal(err)
		}
		failed := Restore([]*api.Socket{s}, map[int]int{7: os.Getpid()})
		if len(failed) != 1 || !strings.Contains(failed[0].Error(), want) {
			t.Errorf("%q: %v", want, failed)
		}
		if n, err := unix.GetsockoptInt(fd, unix.SOL_TCP, unix.TCP_USER_TIMEOUT); s.GetPid() == 7 && s.GetFd() == int32(fd) && (err != nil || n != 4321) {
			t.Errorf("%q: the user timeout is %d (%v)", want, n, err)
		}
	}
}

func TestParseGroups(t *testing.T) {
	number := func(a, b, c, d byte) string {
		return fmt.Sprintf("%08X", binary.NativeEndian.Uint32([]byte{a, b, c, d}))
	}
	igmp := "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\t\t\t\t" + number(224, 0, 0, 1) + "     1 0:00000000\t\t0\n" +
		"12\teth0      :     2      V3\n\t\t\t\t" + number(239, 1, 2, 3) + "     1 0:00000000\t\t0\n\t\t\t\t" + number(224, 0, 0, 1) + "     1 0:00000000\t\t0\n"
	lists := func(list []group, err error) string {
		var out []string
		for _, g := range list {
			out = append(out, fmt.Sprintf("%d %s %s", g.index, g.iface, g.addr))
		}
		return fmt.Sprint(strings.Join(out, ", "), " ", err)
	}
	if have, want := lists(parseIGMP(strings.NewReader(igmp))), "1 lo 224.0.0.1, 12 eth0 239.1.2.3, 12 eth0 224.0.0.1 <nil>"; have != want {
		t.Errorf("%s, not %s", have, want)
	}
	igmp6 := "1    lo              ff020000000000000000000000000001     1 0000000C 0\n2    eth0            ff0200000000000000000001ff000002     1 00000004 0\n"
	if have, want := lists(parseIGMP6(strings.NewReader(igmp6))), "1 lo ff02::1, 2 eth0 ff02::1:ff00:2 <nil>"; have != want {
		t.Errorf("%s, not %s", have, want)
	}
	for _, bad := range []string{"x\teth0 : 1\n", "1\teth0 : 1\n\t\tnothing 1\n"} {
		if list, err := parseIGMP(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: %v", bad, list)
		}
	}
	for _, bad := range []string{"x eth0 ff02\n", "1 eth0 ff02 1\n", "1 eth0 zz 1\n"} {
		if list, err := parseIGMP6(strings.NewReader(bad)); err == nil {
			t.Errorf("%q: %v", bad, list)
		}
	}
}

func TestFilterIsTheKernels(t *testing.T) {
	var f filter
	if unsafe.Offsetof(f.Group) != 8 || unsafe.Offsetof(f.Mode) != 8+storageSize || unsafe.Offsetof(f.Sources) != filterHeader || unsafe.Sizeof(storage{}) != storageSize {
		t.Errorf("struct group_filter is laid out as %+v", f)
	}
}
