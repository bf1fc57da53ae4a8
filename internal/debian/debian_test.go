// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"strings"
	"testing"
)

func TestParsePath(t *testing.T) {
	for _, c := range []struct {
		path, name, version, err string
	}{
		{path: "/apt/criu_4.2.1-1_amd64.deb", name: "criu", version: "4.2.1-1"},
		{path: "/apt/libgmp10_2%3a6.3.0+dfsg-5+b2_amd64.deb", name: "libgmp10", version: "2:6.3.0+dfsg-5+b2"},
		{path: "/apt/lock", err: "not the name of a Debian archive"},
	} {
		p, err := parsePath(c.path)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("parsePath(%q): error %v, want one with %q", c.path, err, c.err)
			}
			continue
		}
		if err != nil || p.Name != c.name || p.Version != c.version || p.Path != c.path {
			t.Errorf("parsePath(%q) = %+v, %v", c.path, p, err)
		}
	}
}
