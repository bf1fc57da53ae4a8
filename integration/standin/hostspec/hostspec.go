// SPDX-License-Identifier: Apache-2.0

// Package hostspec reads a bundle's OCI spec as Kata's shims do, and rewrites
// it for the guest by removing what belongs to the host. It has no side
// effects. Kata 4.1.0: constrainGRPCSpec in
// src/runtime/virtcontainers/kata_agent.go, and amend_spec in
// src/runtime-rs/crates/runtimes/virt_container.
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

// Kind is a container's role in its sandbox.
type Kind string

const (
	// Single is a container with a sandbox of its own.
	Single Kind = "single_container"
	// PodSandbox is a pod's sandbox container.
	PodSandbox Kind = "pod_sandbox"
	// PodContainer joins an existing sandbox.
	PodContainer Kind = "pod_container"
)

// OwnsSandbox reports whether the sandbox starts and ends with the container.
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

// Classify returns a container's kind and its sandbox from the engine's
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
	return "", "", fmt.Errorf("container %s has no annotation that names its sandbox", id)
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

// NetworkNamespace returns the engine's network namespace, or an empty string
// for a new one.
func NetworkNamespace(spec *specs.Spec) string {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path
		}
	}
	return ""
}

// SharesPidNamespace reports whether the container joins the PID namespace of
// its sandbox: it does if the spec names any.
func SharesPidNamespace(spec *specs.Spec) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			return ns.Path != ""
		}
	}
	return false
}

// HasHooks reports whether the spec has a hooks object, even an empty one. The
// Rust shim then sends it to the guest, where it replaces the guest's own
// hooks.
func HasHooks(spec *specs.Spec) bool { return spec.Hooks != nil }

// ForGuest returns the guest's spec. Mounts and the root's path are set by
// package share, and the seccomp profile stays or not by the configuration.
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
	linux.MountLabel = ""
	linux.UIDMappings, linux.GIDMappings = nil, nil
	var namespaces []specs.LinuxNamespace
	for _, ns := range linux.Namespaces {
		switch ns.Type {
		case specs.NetworkNamespace, specs.TimeNamespace, specs.PIDNamespace, specs.UserNamespace:
			// The agent sets the PID namespace; the others are the guest's root
			// namespaces.
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
		return nil, fmt.Errorf("copy the OCI spec: %w", err)
	}
	var out specs.Spec
	if err := json.Unmarshal(raw, &out); err != nil {
		return nil, fmt.Errorf("copy the OCI spec: %w", err)
	}
	return &out, nil
}
