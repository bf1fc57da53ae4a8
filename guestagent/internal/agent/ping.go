// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/outcome"
)

// pinging serialises those that change who may make ping sockets.
var pinging sync.Mutex

// allowPing lets CRIU make the ping sockets in its images, until undo is called:
// for those not even root's rights are enough, but the kernel asks for the groups
// of [outcome.PingGroups]. A privileged program may have changed that setting in
// the old guest. Whether the container may have such sockets, package outcome
// finds out.
func allowPing(images string) (undo func() error, err error) {
	some := false
	err = editImage(filepath.Join(images, filesImage), func(f *fdinfo.FileEntry) bool {
		s := f.GetIsk()
		some = some || s.GetType() == unix.SOCK_DGRAM && (s.GetProto() == unix.IPPROTO_ICMP || s.GetProto() == unix.IPPROTO_ICMPV6)
		return false
	})
	if err != nil || !some {
		return func() error { return nil }, err
	}
	pinging.Lock()
	before, err := os.ReadFile(outcome.PingGroups)
	groups := strings.Fields(string(before))
	if err == nil && len(groups) == 2 && groups[0] != "0" {
		err = os.WriteFile(outcome.PingGroups, []byte("0 "+groups[1]), 0)
	}
	if err != nil {
		pinging.Unlock()
		return nil, fmt.Errorf("allow ping sockets: %w", err)
	}
	return func() error {
		defer pinging.Unlock()
		return os.WriteFile(outcome.PingGroups, []byte(strings.Join(groups, " ")), 0)
	}, nil
}
