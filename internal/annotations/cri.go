// SPDX-License-Identifier: Apache-2.0

package annotations

import (
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Kind is a container's place in its sandbox.
type Kind int

const (
	// Single is a container that has a VM for itself.
	Single Kind = iota
	// Sandbox is a pod's first container, which holds its VM.
	Sandbox
	// InPod is a container in the VM of a pod's sandbox.
	InPod
)

// Keys by which Kata tells what a container is: those of containerd, CRI-O and
// dockershim, in this order.
var (
	typeKeys    = []string{"io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType", "io.kubernetes.docker.type"}
	sandboxKeys = []string{"io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id"}
)

// Place returns what a container is in its sandbox, and the sandbox's id.
func Place(id string, annotations map[string]string) (Kind, string, error) {
	switch kind, _ := first(annotations, typeKeys...); kind {
	case "":
		return Single, id, nil
	case "sandbox", "podsandbox":
		return Sandbox, id, nil
	case "container":
		sandbox, key := first(annotations, sandboxKeys...)
		if sandbox == "" {
			return 0, "", errcode.Placement.Errorf("annotation %s is missing: the annotations make %s a container of a pod without naming its sandbox", sandboxKeys[0], id)
		}
		if sandbox == id {
			return 0, "", errcode.Placement.Errorf("annotation %s names the container itself as its sandbox", key)
		}
		return InPod, sandbox, nil
	default:
		return 0, "", errcode.Placement.Errorf("unknown container type %q in the annotations: Kata knows sandbox, podsandbox and container", kind)
	}
}

// InPodOf returns the annotations by which Kata puts a container into a
// sandbox.
func InPodOf(sandbox string) map[string]string {
	return map[string]string{typeKeys[0]: "container", sandboxKeys[0]: sandbox}
}

// MadeByCRI reports whether a container was created by the CRI.
func MadeByCRI(annotations map[string]string) bool {
	kind, _ := first(annotations, typeKeys...)
	return kind != ""
}

// ImageName returns the image of a container, by a name or by its id, "" for
// containers that the CRI did not create.
func ImageName(annotations map[string]string) string {
	v, _ := first(annotations, "io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
	return v
}

// ContainerName returns a container's name in its pod.
func ContainerName(annotations map[string]string) string {
	v, _ := first(annotations, "io.kubernetes.cri.container-name", "io.kubernetes.container.name")
	return v
}

// PodNamespace returns the Kubernetes namespace of a container's pod.
func PodNamespace(annotations map[string]string) string {
	v, _ := first(annotations, "io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")
	return v
}

// PodName returns the name of a container's pod.
func PodName(annotations map[string]string) string {
	v, _ := first(annotations, "io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name")
	return v
}

// PodUID returns the UID of a container's pod.
func PodUID(annotations map[string]string) string {
	v, _ := first(annotations, "io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid")
	return v
}

// first returns the first value that is not empty, and its key.
func first(annotations map[string]string, keys ...string) (value, key string) {
	for _, k := range keys {
		if v := annotations[k]; v != "" {
			return v, k
		}
	}
	return "", ""
}
