package bundle

import "fmt"

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

// Keys of annotations, one per engine that Kata knows (containerd, CRI-O,
// dockershim), as in src/libs/kata-types/src/k8s.rs. Kata's answer to what a
// container is must be ours.
var (
	typeKeys    = []string{"io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType", "io.kubernetes.docker.type"}
	sandboxKeys = []string{"io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id"}
)

// Place says what a container is in its sandbox, and the sandbox's id.
func Place(id string, annotations map[string]string) (Kind, string, error) {
	switch kind, _ := first(annotations, typeKeys); kind {
	case "":
		return Single, id, nil
	case "sandbox", "podsandbox":
		return Sandbox, id, nil
	case "container":
		sandbox, key := first(annotations, sandboxKeys)
		if sandbox == "" {
			return 0, "", fmt.Errorf("the annotations say that %s is a container of a pod and not of which: %s is missing", id, sandboxKeys[0])
		}
		if sandbox == id {
			return 0, "", fmt.Errorf("annotation %s names the container itself as its sandbox", key)
		}
		return InPod, sandbox, nil
	default:
		return 0, "", fmt.Errorf("container type %q in the annotations is none that Kata knows", kind)
	}
}

// MadeByCRI says whether the CRI made a container.
func MadeByCRI(annotations map[string]string) bool {
	kind, _ := first(annotations, typeKeys)
	return kind != ""
}

func first(annotations map[string]string, keys []string) (value, key string) {
	for _, k := range keys {
		if v := annotations[k]; v != "" {
			return v, k
		}
	}
	return "", ""
}

// InPodOf returns the annotations that make Kata put a container into a
// sandbox.
func InPodOf(sandbox string) map[string]string {
	return map[string]string{typeKeys[0]: "container", sandboxKeys[0]: sandbox}
}
