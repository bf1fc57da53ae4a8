// Package hostspec reads a bundle's specification as Kata's shims do, and
// rewrites it for the guest: what belongs to the host is taken out. It is pure.
// Kata: constrainGRPCSpec in src/runtime/virtcontainers/kata_agent.go, and
// amend_spec in src/runtime-rs/crates/runtimes/virt_container.
package hostspec

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Kind is a container's place in its sandbox.
type Kind string

const (
	// Single is a sandbox of its own.
	Single Kind = "single_container"
	// PodSandbox is the first container of a pod.
	PodSandbox Kind = "pod_sandbox"
	// PodContainer joins a sandbox that is there.
	PodContainer Kind = "pod_container"
)

// OwnsSandbox says whether the sandbox begins and ends with the container.
func (k Kind) OwnsSandbox() bool { return k != PodContainer }

var kindKeys = []string{
	"io.kubernetes.cri.container-type",
	"io.kubernetes.cri-o.ContainerType",
	"io.kubernetes.docker.type",
}

var sandboxKeys = []string{
	"io.kubernetes.cri.sandbox-id",
	"io.kubernetes.cri-o.SandboxID",
	"io.kubernetes.sandbox.id",
}

// Load reads a bundle's config.json.
func Load(bundle string) (*specs.Spec, error) {
	raw, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the bundle: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(raw, &spec); err != nil {
		return nil, fmt.Errorf("read the bundle %s: %w", bundle, err)
	}
	if spec.Process == nil || spec.Root == nil || spec.Linux == nil {
		return nil, fmt.Errorf("the bundle %s has no process, root or linux part", bundle)
	}
	return &spec, nil
}

// Classify tells a container's kind and its sandbox by the engine's
// annotations.
func Classify(id string, annotations map[string]string) (Kind, string, error) {
	kind, err := kindOf(annotations)
	if err != nil || kind.OwnsSandbox() {
		return kind, id, err
	}
	for _, key := range sandboxKeys {
		if sandbox := annotations[key]; sandbox != "" {
			return kind, sandbox, nil
		}
	}
	return "", "", fmt.Errorf("container %s belongs to a sandbox that no annotation names", id)
}

func kindOf(annotations map[string]string) (Kind, error) {
	for _, key := range kindKeys {
		switch value := annotations[key]; value {
		case "":
		case "sandbox", "podsandbox":
			return PodSandbox, nil
		case "container":
			return PodContainer, nil
		default:
			return "", fmt.Errorf("unknown container type %q", value)
		}
	}
	return Single, nil
}

// NetworkNamespace is the network namespace that the engine made, "" for a new
// one.
func NetworkNamespace(spec *specs.Spec) string {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path
		}
	}
	return ""
}

// SharesPidNamespace says whether the container joins the pid namespace of its
// sandbox: it does if the engine names any.
func SharesPidNamespace(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			return ns.Path != ""
		}
	}
	return false
}

// HasHooks says whether the specification has a hooks object, be it empty. The
// Rust shim then sends one to the guest, where the guest's own hooks get lost.
func HasHooks(spec *specs.Spec) bool { return spec.Hooks != nil }

// ForGuest answers the specification that the guest gets. Mounts and the root's
// path are the share's business.
func ForGuest(w way.Way, kind Kind, bundle string, spec *specs.Spec) (*specs.Spec, error) {
	guest, err := clone(spec)
	if err != nil {
		return nil, err
	}
	guest.Hooks = nil
	guest.Annotations = nil
	if w == way.Rust {
		if spec.Hooks != nil {
			guest.Hooks = &specs.Hooks{StartContainer: spec.Hooks.StartContainer}
		}
		guest.Annotations = maps.Clone(spec.Annotations)
		if guest.Annotations == nil {
			guest.Annotations = map[string]string{}
		}
		guest.Annotations["io.katacontainers.pkg.oci.container_type"] = string(kind)
		guest.Annotations["io.katacontainers.pkg.oci.bundle_path"] = bundle
	}
	guest.Process.ApparmorProfile = ""
	guest.Process.SelinuxLabel = ""

	linux := guest.Linux
	linux.Seccomp = nil
	linux.MountLabel = ""
	linux.UIDMappings, linux.GIDMappings = nil, nil
	var namespaces []specs.LinuxNamespace
	for _, ns := range linux.Namespaces {
		switch ns.Type {
		case specs.NetworkNamespace, specs.TimeNamespace, specs.PIDNamespace, specs.UserNamespace:
			// The agent decides about pid; the others are the guest's root
			// ones.
		default:
			namespaces = append(namespaces, specs.LinuxNamespace{Type: ns.Type})
		}
	}
	linux.Namespaces = namespaces
	if r := linux.Resources; r != nil {
		r.Devices, r.Pids, r.BlockIO, r.Network = nil, nil, nil, nil
		if r.CPU != nil {
			r.CPU.Cpus, r.CPU.Mems = "", ""
		}
	}
	return guest, nil
}

func clone(spec *specs.Spec) (*specs.Spec, error) {
	raw, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("copy the specification: %w", err)
	}
	var out specs.Spec
	if err := json.Unmarshal(raw, &out); err != nil {
		return nil, fmt.Errorf("copy the specification: %w", err)
	}
	return &out, nil
}
