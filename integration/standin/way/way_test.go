// SPDX-License-Identifier: Apache-2.0

package way

import "testing"

func TestAddressDiffersInCaseOnly(t *testing.T) {
	// sha256 of "/run/containerd/containerd.sock/default/c1"
	const digest = "d25aa4ef11a84e95"
	goAddress := Go.Address("/run/containerd/containerd.sock", "default", "c1")
	rustAddress := Rust.Address("/run/containerd/containerd.sock", "default", "c1")
	const prefix = "unix:///run/containerd/s/"
	if got := goAddress[:len(prefix)+len(digest)]; got != prefix+digest {
		t.Errorf("Go: %s", goAddress)
	}
	if want := "D25AA4EF11A84E95"; rustAddress[len(prefix):len(prefix)+len(want)] != want {
		t.Errorf("Rust: %s", rustAddress)
	}
}

func TestOfBinary(t *testing.T) {
	for _, c := range []struct {
		env, executable string
		want            Way
		fails           bool
	}{
		{executable: "/opt/standin/go/containerd-shim-kata-v2", want: Go},
		{executable: "/opt/standin/rust/containerd-shim-kata-v2", want: Rust},
		{env: "rust", executable: "/opt/standin/go/containerd-shim-kata-v2", want: Rust},
		{executable: "/usr/local/bin/containerd-shim-kata-v2", fails: true},
		{env: "c", executable: "/opt/standin/go/containerd-shim-kata-v2", fails: true},
	} {
		t.Setenv(Env, c.env)
		got, err := OfBinary(c.executable)
		if got != c.want || (err != nil) != c.fails {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
	}
}

func TestSocketsWhereKataHasThem(t *testing.T) {
	for _, c := range [][2]string{
		{Go.MonitorSocket("s"), "/run/vc/sbs/s/shim-monitor.sock"},
		{Rust.MonitorSocket("s"), "/run/kata/s/shim-monitor.sock"},
		{Go.VsockSocket("s"), "/run/vc/vm/s/clh.sock"},
		{Rust.VsockSocket("s"), "/run/kata/s/ch-vm.sock"},
	} {
		if c[0] != c[1] {
			t.Errorf("%s, want %s", c[0], c[1])
		}
	}
}
