// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// What of a request becomes an option of CRIU, which parses it, has a grammar. A
// NUL ends a string for CRIU, and what follows the name of an external mount is
// the path that is mounted: "m0]:/\x00" would give a container the guest's root.
func TestRequestsAreChecked(t *testing.T) {
	external := func(names ...string) *api.RestoreRequest {
		r := &api.RestoreRequest{}
		for i, n := range names {
			r.Externals = append(r.Externals, &api.External{Name: n, Destination: "/data" + strings.Repeat("x", i)})
		}
		return r
	}
	stdio := func(fd uint32, key string) *api.RestoreRequest {
		return &api.RestoreRequest{Stdio: []*api.Stdio{{Fd: fd, Key: key}}}
	}
	sockets := func(list ...*api.Socket) *api.RestoreRequest { return &api.RestoreRequest{Sockets: list} }
	for name, tc := range map[string]struct {
		r  *api.RestoreRequest
		ok bool
	}{
		"nothing":                       {&api.RestoreRequest{}, true},
		"two mounts":                    {external("m0", "m1"), true},
		"a pipe":                        {stdio(1, "pipe:[4026531840]"), true},
		"a terminal":                    {stdio(0, "tty[8803:17]"), true},
		"a descriptor without a key":    {stdio(2, ""), true},
		"a path behind a name":          {external("m0]:/\x00"), false},
		"CRIU's automatic mode":         {external(""), false},
		"another order":                 {external("m1", "m0"), false},
		"a relative destination":        {&api.RestoreRequest{Externals: []*api.External{{Name: "m0", Destination: "data"}}}, false},
		"a destination with ..":         {&api.RestoreRequest{Externals: []*api.External{{Name: "m0", Destination: "/data/../x"}}}, false},
		"the root":                      {&api.RestoreRequest{Externals: []*api.External{{Name: "m0", Destination: "/"}}}, false},
		"a destination with a NUL":      {&api.RestoreRequest{Externals: []*api.External{{Name: "m0", Destination: "/data\x00"}}}, false},
		"any descriptor":                {stdio(4711, "pipe:[7]"), false},
		"any file of the images":        {stdio(1, "etc/passwd"), false},
		"a namespace":                   {stdio(1, criu.PIDNamespaceKey), false},
		"a key with a NUL":              {stdio(1, "pipe:[7]\x00"), false},
		"a namespace that CRIU creates": {&api.RestoreRequest{Options: &api.CheckpointOptions{EmptyNamespaces: []string{"user"}}}, false},
		"a connection without an end":   {&api.RestoreRequest{Connections: []*api.Connection{{Local: "192.0.2.1:80"}}}, false},
		"an interface with a path":      {&api.RestoreRequest{Addresses: []*api.Address{{Interface: "../eth0", Address: "192.0.2.1"}}}, false},
		"a socket":                      {sockets(&api.Socket{Pid: 1, Fd: 3, Options: []*api.SocketOption{{Level: 6, Name: 13, Text: "reno"}}, Memberships: []*api.Membership{{Interface: "eth0", Group: "232.0.0.1", Sources: []string{"192.0.2.1"}}}}), true},
		"a socket of no process":        {sockets(&api.Socket{Fd: 3}), false},
		"a negative descriptor":         {sockets(&api.Socket{Pid: 1, Fd: -1}), false},
		"an option with a path":         {sockets(&api.Socket{Pid: 1, Options: []*api.SocketOption{{Text: "../x"}}}), false},
		"an invalid group":              {sockets(&api.Socket{Pid: 1, Memberships: []*api.Membership{{Interface: "eth0", Group: "192.0.2.1"}}}), false},
		"a group on no interface":       {sockets(&api.Socket{Pid: 1, Memberships: []*api.Membership{{Group: "232.0.0.1"}}}), false},
		"a source of another family":    {sockets(&api.Socket{Pid: 1, Memberships: []*api.Membership{{Interface: "eth0", Group: "232.0.0.1", Sources: []string{"2001:db8::1"}}}}), false},
		"a relative file":               {&api.RestoreRequest{OpenFiles: []*api.OpenFile{{Path: []byte("etc")}}}, false},
		"a feature that is a sentence":  {&api.RestoreRequest{CpuFeatures: []string{"avx\x1b[2J"}}, false},
	} {
		if err := checkRequest(tc.r); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// CRIU's names of mounts are the agent's, whatever a request has.
func TestMountsAreNamedByTheAgent(t *testing.T) {
	op, err := criu.NewOp(t.TempDir(), launch.Job{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer op.Close()
	opts := restoreOptions(op, &api.RestoreRequest{Externals: []*api.External{{Name: "m0]:/\x00", Destination: "/data"}, {Destination: "/more"}}}, "")
	want := []string{"mnt[m0]:" + filepath.Join(op.Dir(), "mnt/1"), "mnt[m1]:" + filepath.Join(op.Dir(), "mnt/2")}
	if !slices.Equal(opts.GetExternal(), want) {
		t.Errorf("externals %q, want %q", opts.GetExternal(), want)
	}
}

// CRIU opens by name whatever it has a use for: only images that it writes of a
// container are let through.
func TestOnlyImagesOfContainers(t *testing.T) {
	file := func(name string) func(string) error {
		return func(dir string) error { return os.WriteFile(filepath.Join(dir, name), nil, 0o600) }
	}
	for name, tc := range map[string]struct {
		lay func(dir string) error
		ok  bool
	}{
		"images":                     {file("core-1.img"), true},
		"the archive of /dev/shm":    {file("dev-shm.tar"), true},
		"credentials of an old CRIU": {file("creds-1.img"), false},
		"a user namespace":           {file("userns-9.img"), false},
		"a network namespace":        {file("netns-9.img"), false},
		"packet filters":             {file("iptables-9.img"), false},
		"AppArmor policies":          {file("apparmor.img"), false},
		"handlers of binary formats": {file("binfmt-misc.img"), false},
		"a directory":                {func(dir string) error { return os.Mkdir(filepath.Join(dir, "core-1.img"), 0o700) }, false},
		"a link":                     {func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "core-1.img")) }, false},
		"a FIFO":                     {func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "core-1.img"), 0o600) }, false},
		"a link to earlier images":   {func(dir string) error { return os.Symlink("..", filepath.Join(dir, "parent")) }, false},
	} {
		dir := t.TempDir()
		if err := tc.lay(dir); err != nil {
			t.Fatal(err)
		}
		if err := checkImages(dir); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
