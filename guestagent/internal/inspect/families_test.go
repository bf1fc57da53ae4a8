// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// No machine that runs this has to have a protocol above TCP in its kernel.
func TestProtocolsAboveTCPAreRefused(t *testing.T) {
	if r := upperProtocol("tls", nil); r.class != Refused || !strings.Contains(r.what, `TCP with "tls" in the kernel`) {
		t.Errorf("TLS: %+v", r)
	}
	for name, err := range map[string]error{"": nil, "tls": unix.ENOPROTOOPT} {
		if r := upperProtocol(name, err); r.class != Good {
			t.Errorf("%q, %v: %+v", name, err, r)
		}
	}
}

// Sockets of this process are judged by what the kernel says about them.
func TestUnusualSockets(t *testing.T) {
	join := func(group int) func(int) error {
		return func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
		}
	}
	for name, tc := range map[string]struct {
		domain, kind, protocol int
		prepare                func(int) error
		refused                string
	}{
		"unix":          {domain: unix.AF_UNIX, kind: unix.SOCK_STREAM},
		"TCP":           {domain: unix.AF_INET, kind: unix.SOCK_STREAM},
		"UDP over IPv6": {domain: unix.AF_INET6, kind: unix.SOCK_DGRAM},
		"UDP, corked": {domain: unix.AF_INET, kind: unix.SOCK_DGRAM, prepare: func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_UDP, 1, 1) // UDP_CORK
		}, refused: "UDP_CORK"},
		"raw":                        {domain: unix.AF_INET, kind: unix.SOCK_RAW, protocol: unix.IPPROTO_SCTP},
		"packet":                     {domain: unix.AF_PACKET, kind: unix.SOCK_RAW},
		"netlink":                    {domain: unix.AF_NETLINK, kind: unix.SOCK_RAW, protocol: unix.NETLINK_ROUTE, prepare: join(32)},
		"netlink with a group of 33": {domain: unix.AF_NETLINK, kind: unix.SOCK_RAW, protocol: unix.NETLINK_ROUTE, prepare: join(33), refused: "netlink multicast groups beyond the first 32"},
		"vsock":                      {domain: unix.AF_VSOCK, kind: unix.SOCK_STREAM, refused: "vsock"},
		"kernel crypto":              {domain: unix.AF_ALG, kind: unix.SOCK_SEQPACKET, refused: "AF_ALG"},
		"MPTCP":                      {domain: unix.AF_INET, kind: unix.SOCK_STREAM, protocol: unix.IPPROTO_MPTCP, refused: "MPTCP"},
	} {
		t.Run(name, func(t *testing.T) {
			fd, err := unix.Socket(tc.domain, tc.kind|unix.SOCK_CLOEXEC, tc.protocol)
			if err != nil {
				t.Skipf("this machine makes no such socket: %v", err)
			}
			defer unix.Close(fd)
			if tc.prepare != nil {
				if err := tc.prepare(fd); err != nil {
					t.Fatal(err)
				}
			}
			self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "test"}
			c := &Container{Root: self, Processes: []*Process{self}, sockets: sockets{owners: map[uint32]owner{1: {self, fd}}}}
			err = Refusal(c.unusualSockets(nil))
			if tc.refused == "" && err != nil || tc.refused != "" && (err == nil || !strings.Contains(err.Error(), tc.refused)) {
				t.Errorf("got %v, want a refusal with %q", err, tc.refused)
			}
		})
	}
}
