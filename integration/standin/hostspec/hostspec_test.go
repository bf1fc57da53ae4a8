// SPDX-License-Identifier: Apache-2.0

package hostspec

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

func TestClassify(t *testing.T) {
	for name, c := range map[string]struct {
		annotations map[string]string
		kind        Kind
		sandbox     string
		fails       bool
	}{
		"none":       {nil, Single, "c1", false},
		"cri pause":  {map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c1"}, PodSandbox, "c1", false},
		"cri":        {map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"}, PodContainer, "s1", false},
		"cri-o":      {map[string]string{"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "s1"}, PodContainer, "s1", false},
		"no sandbox": {map[string]string{"io.kubernetes.cri.container-type": "container"}, "", "", true},
		"nonsense":   {map[string]string{"io.kubernetes.cri.container-type": "ship"}, "", "c1", true},
	} {
		kind, sandbox, err := Classify("c1", c.annotations)
		if kind != c.kind || sandbox != c.sandbox || (err != nil) != c.fails {
			t.Errorf("%s: %q %q %v", name, kind, sandbox, err)
		}
	}
}

func spec() *specs.Spec {
	return &specs.Spec{
		Annotations: map[string]string{"a": "b"},
		Hooks:       &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/hook"}}, StartContainer: []specs.Hook{{Path: "/inside"}}},
		Process:     &specs.Process{Args: []string{"sh"}, ApparmorProfile: "x", SelinuxLabel: "y"},
		Root:        &specs.Root{Path: "rootfs", Readonly: true},
		Linux: &specs.Linux{
			Seccomp: &specs.LinuxSeccomp{},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace, Path: "/proc/7/ns/pid"}, {Type: specs.NetworkNamespace, Path: "/run/netns/x"},
				{Type: specs.IPCNamespace, Path: "/proc/7/ns/ipc"}, {Type: specs.MountNamespace}, {Type: specs.UserNamespace}, {Type: specs.TimeNamespace},
			},
			UIDMappings: []specs.LinuxIDMapping{{Size: 1}},
			Resources:   &specs.LinuxResources{Pids: &specs.LinuxPids{}, CPU: &specs.LinuxCPU{Cpus: "0-3"}, Memory: &specs.LinuxMemory{}},
			MaskedPaths: []string{"/proc/kcore"},
		},
	}
}

func TestTheGuestGetsNothingOfTheHost(t *testing.T) {
	want := &specs.Spec{
		Process: &specs.Process{Args: []string{"sh"}},
		Root:    &specs.Root{Path: "rootfs", Readonly: true},
		Linux: &specs.Linux{
			Seccomp:     &specs.LinuxSeccomp{},
			Namespaces:  []specs.LinuxNamespace{{Type: specs.IPCNamespace}, {Type: specs.MountNamespace}},
			Resources:   &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}},
			MaskedPaths: []string{"/proc/kcore"},
		},
	}
	original := spec()
	got, err := ForGuest(way.Go, PodContainer, "/bundle", original)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Go: %s", diff)
	}
	if diff := cmp.Diff(spec(), original); diff != "" {
		t.Errorf("the bundle's own specification changed: %s", diff)
	}

	want.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/inside"}}}
	want.Annotations = map[string]string{
		"a": "b", "io.katacontainers.pkg.oci.container_type": "pod_container", "io.katacontainers.pkg.oci.bundle_path": "/bundle",
	}
	got, err = ForGuest(way.Rust, PodContainer, "/bundle", original)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Rust: %s", diff)
	}
}

func TestNamespacesOfTheEngine(t *testing.T) {
	s := spec()
	if !SharesPidNamespace(s) || NetworkNamespace(s) != "/run/netns/x" {
		t.Error("the engine's namespaces were overlooked")
	}
	s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}}
	if SharesPidNamespace(s) || NetworkNamespace(s) != "" {
		t.Error("new namespaces were taken for the engine's")
	}
}
