// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/outcome"
)

// The kernel lets nobody make ping sockets by default, and CRIU must, for those
// that are in its images.
func TestPingSocketsAreAllowedWhileTheyAreRestored(t *testing.T) {
	inNetworkNamespace(t)
	ping := func() bool {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return false
		}
		unix.Close(fd)
		return true
	}
	groups := func() string {
		data, err := os.ReadFile(outcome.PingGroups)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(strings.Fields(string(data)), " ")
	}
	if before := groups(); before != "1 0" || ping() {
		t.Fatalf("a new network namespace has %q", before)
	}
	for name, tc := range map[string]struct {
		kind, proto uint32
		allowed     bool
	}{
		"IPv4": {unix.SOCK_DGRAM, unix.IPPROTO_ICMP, true},
		"IPv6": {unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6, true},
		"UDP":  {unix.SOCK_DGRAM, unix.IPPROTO_UDP, false},
		"raw":  {unix.SOCK_RAW, unix.IPPROTO_ICMP, false},
	} {
		images := t.TempDir()
		writeFiles(t, images, socket{kind: tc.kind, protocol: tc.proto, local: "0.0.0.0:0", remote: "0.0.0.0:0"}.entry(1))
		undo, err := allowPing(images)
		if err != nil {
			t.Fatal(err)
		}
		if ping() != tc.allowed {
			t.Errorf("%s: allowed: %t", name, !tc.allowed)
		}
		if err := undo(); err != nil || groups() != "1 0" {
			t.Errorf("%s: %q is left, %v", name, groups(), err)
		}
	}
}
