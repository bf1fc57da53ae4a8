// SPDX-License-Identifier: Apache-2.0

package task

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// plainSpec is a spec as containerd makes it of a container that is not privileged.
func plainSpec(change func(*specs.Spec)) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL"}
	s := &specs.Spec{
		Process: &specs.Process{User: specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{7}}, NoNewPrivileges: true, Capabilities: &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps}},
		Linux: &specs.Linux{
			Seccomp: &specs.LinuxSeccomp{}, MaskedPaths: []string{"/proc/kcore", "/sys/devices/system/cpu/cpu0/thermal_throttle"}, ReadonlyPaths: []string{"/proc/sys"},
			Namespaces: []specs.LinuxNamespace{{Type: "pid"}, {Type: "mount"}, {Type: "network", Path: "/netns"}},
		},
	}
	if change != nil {
		change(s)
	}
	return s
}

// A container's processes come back with all that they had. What the new
// container does not have as well is a reason to refuse them.
func TestExceedingRights(t *testing.T) {
	for name, tc := range map[string]struct {
		had, has func(*specs.Spec)
		want     string
	}{
		"the same":                    {nil, nil, ""},
		"more of everything":          {nil, func(s *specs.Spec) { s.Process.User = specs.User{}; s.Process.NoNewPrivileges = false; s.Linux = nil }, ""},
		"other processors":            {func(s *specs.Spec) { s.Linux.MaskedPaths[1] = "/sys/devices/system/cpu/cpu17/thermal_throttle" }, nil, ""},
		"a capability in lower case":  {func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"cap_chown"} }, nil, ""},
		"root":                        {func(s *specs.Spec) { s.Process.User.UID = 0 }, nil, "it ran as the user 0 and this container runs as 1000"},
		"another group":               {func(s *specs.Spec) { s.Process.User.GID = 0 }, nil, "it had the group 0"},
		"one more group":              {func(s *specs.Spec) { s.Process.User.AdditionalGids = []uint32{7, 8} }, nil, "it had the group 8"},
		"a user whom root may become": {nil, func(s *specs.Spec) { s.Process.User = specs.User{} }, ""},
		"a capability":                {func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_SYS_ADMIN"} }, nil, "it had CAP_SYS_ADMIN, which this container lacks"},
		"an effective capability":     {nil, func(s *specs.Spec) { s.Process.Capabilities.Effective = nil }, "it had CAP_CHOWN, CAP_KILL among the effective"},
		"an ambient capability":       {func(s *specs.Spec) { s.Process.Capabilities.Ambient = []string{"CAP_KILL"} }, nil, "CAP_KILL among the ambient"},
		"capabilities without limits": {func(s *specs.Spec) { s.Process.Capabilities = nil }, nil, "were not limited"},
		"limits that nobody mentions": {nil, func(s *specs.Spec) { s.Process.Capabilities = nil }, "it had CAP_CHOWN"},
		"neither mentions any":        {func(s *specs.Spec) { s.Process.Capabilities = nil }, func(s *specs.Spec) { s.Process.Capabilities = nil }, ""},
		"new privileges":              {func(s *specs.Spec) { s.Process.NoNewPrivileges = false }, nil, "could gain privileges"},
		"no seccomp profile":          {func(s *specs.Spec) { s.Linux.Seccomp = nil }, nil, "no seccomp profile"},
		"an unmasked /proc":           {func(s *specs.Spec) { s.Linux.MaskedPaths = nil }, nil, "it saw what is masked in this container: /proc/kcore, /sys/devices/system/cpu/cpu*/thermal_throttle"},
		"a writable /proc/sys":        {func(s *specs.Spec) { s.Linux.ReadonlyPaths = nil }, nil, "it could write to what is read-only in this container: /proc/sys"},
		"a masked one that is read-only": {func(s *specs.Spec) {
			s.Linux.ReadonlyPaths, s.Linux.MaskedPaths = nil, append(s.Linux.MaskedPaths, "/proc/sys")
		}, nil, ""},
		"the guest's processes": {func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] }, nil, "in the guest's own namespaces of the types pid"},
		"its pod's processes":   {func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/1/ns/pid" }, nil, ""},
		"two things":            {func(s *specs.Spec) { s.Linux.Seccomp, s.Process.User.UID = nil, 0 }, nil, "no seccomp profile"},
	} {
		got := strings.Join(exceeding(rightsIn(plainSpec(tc.had)), rightsIn(plainSpec(tc.has))), "; ")
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// They are compared with what is in the signed manifest.
func TestRightsOfTheSourceAreKept(t *testing.T) {
	node, path := t.TempDir(), t.TempDir()
	before := newHarness(t, onNode(node))
	before.run(func(s *specs.Spec) { s.Process.NoNewPrivileges, s.Process.User.UID = false, 0 })
	if err := before.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	set, err := imageset.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if r := set.Manifest.Rights; r == nil || r.UID != 0 || r.NoNewPrivs || r.Capabilities == nil || len(r.Capabilities.Bounding) != 1 {
		t.Errorf("rights %+v", r)
	}
	h := newHarness(t, onNode(node))
	_, err = h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil), Checkpoint: path})
	wantError(t, err, "does not fit this container", "ran as the user 0", "could gain privileges")
	h.wantCalls("Kata", h.kata.Calls())
}

// The agent checks what was restored in any case, also where the specification
// names no capabilities, or has no process at all.
func TestRightsOfASpecification(t *testing.T) {
	all := rightsOf(&specs.Process{NoNewPrivileges: true, User: specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}}})
	if !slices.Contains(all.GetCapabilities(), "CAP_SYS_ADMIN") || !slices.Equal(all.GetPermitted(), all.GetCapabilities()) || len(all.GetAmbient()) > 0 ||
		!all.GetNoNewPrivs() || all.GetUid() != 7 || all.GetGid() != 8 || !slices.Equal(all.GetGroups(), []uint32{9}) {
		t.Errorf("without capabilities: %v", all)
	}
	some := rightsOf(&specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}, Effective: []string{"CAP_KILL"}},
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 9, Soft: 1}}})
	if !slices.Equal(some.GetCapabilities(), []string{"CAP_CHOWN"}) || len(some.GetPermitted()) > 0 || some.GetLimits()["RLIMIT_NOFILE"] != 9 {
		t.Errorf("with one: %v", some)
	}
	if none := rightsOf(nil); none == nil || len(none.GetCapabilities()) > 0 {
		t.Errorf("without a process: %v", none)
	}
}
