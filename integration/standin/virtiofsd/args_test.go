// SPDX-License-Identifier: Apache-2.0

package virtiofsd

import (
	"strings"
	"testing"
)

func TestArguments(t *testing.T) {
	for _, tc := range []struct{ name, rust, want, err string }{
		{"Kata's Go shim", "--syslog --cache=auto --shared-dir=/run/s/shared --fd=3 --thread-pool-size=1 --announce-submounts",
			"-f --syslog -o cache=auto -o source=/run/s/shared --fd=3 --thread-pool-size=1 -o announce_submounts", ""},
		{"Kata's Rust shim", "--socket-path /run/k/s.sock --shared-dir /run/s/ro --cache auto --thread-pool-size=1 -o announce_submounts --xattr",
			"-f --socket-path=/run/k/s.sock -o source=/run/s/ro -o cache=auto --thread-pool-size=1 -o announce_submounts -o xattr", ""},
		{"no cache", "--cache never --cache=metadata", "-f -o cache=none -o cache=none", ""},
		{"dropped with its value", "--sandbox none --seccomp=none --socket-path=/s", "-f --socket-path=/s", ""},
		{"an attached mount option", "-oxattr", "-f -o xattr", ""},
		{"unknown", "--uring", "", `unknown argument "--uring"`},
		{"not an option", "/etc", "", `unknown argument "/etc"`},
		{"no value", "--shared-dir", "", "option --shared-dir lacks its value"},
		{"unknown cache", "--cache=most", "", `unknown cache mode "most"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Arguments(strings.Fields(tc.rust))
			text := ""
			if err != nil {
				text = err.Error()
			}
			if joined := strings.Join(got, " "); joined != tc.want || text != tc.err {
				t.Errorf("got %q, %q\nwant %q, %q", joined, text, tc.want, tc.err)
			}
		})
	}
}
