// Package nri says what a container needs in its spec so that it can be
// checkpointed. [Adjust] is a pure function with two callers: the NRI plugin,
// for what the CRI creates, and the shim (package plugin/internal/task), for every
// other engine and for containers that the plugin missed, since NRI lets a
// container through when a plugin is away.
package adjust

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	// AnnotationPrefix starts all annotations of ours.
	AnnotationPrefix = "kata-checkpoint.dev/"

	// AnnotationAfter on a container says what becomes of it after a
	// checkpoint: "stop" or "leave-running". It beats what the engine says.
	AnnotationAfter = AnnotationPrefix + "after"

	// AnnotationExternals lists, separated by commas, mount points whose
	// content is not to go into an image set. A user may set it; Adjust adds
	// what the host knows to be external.
	AnnotationExternals = AnnotationPrefix + "external-mounts"

	// AnnotationRestorePrefix starts an annotation of a pod; behind it comes the
	// name of one of its containers. The value is the name of a checkpoint
	// archive in restore_dir, from which that container starts for the first time.
	AnnotationRestorePrefix = AnnotationPrefix + "restore."

	// AnnotationMarker is on a container that the NRI plugin has adjusted; its
	// value is the plugin's version. It is for the log: whoever writes it by
	// hand gains nothing, as the shim adds what is missing in any case.
	AnnotationMarker = AnnotationPrefix + "nri"

	// ExchangeDestination is where the exchange mount is in a container until
	// it starts. It lies in the root directory, where its mount point leaves no
	// trace once both are withdrawn.
	ExchangeDestination = "/.kata-checkpoint"
)

// Container is what a container's spec says, as far as it matters here.
type Container struct {
	// Namespace is containerd's.
	Namespace   string
	ID          string
	Annotations map[string]string
	Mounts      []specs.Mount
}

// Adjustment is what is to be added to a spec.
type Adjustment struct {
	Mounts      []specs.Mount
	Annotations map[string]string
}

// Empty says that the spec is as it has to be.
func (a *Adjustment) Empty() bool { return len(a.Mounts) == 0 && len(a.Annotations) == 0 }

// ExchangeDir is the host directory by which a container's images travel. No
// identifier of containerd holds two dashes in a row, so that no two pairs of
// namespace and id have the same.
func ExchangeDir(stateDir, namespace, id string) string {
	return filepath.Join(stateDir, "exchange", namespace+"--"+id)
}

// Adjust returns what a container's spec lacks. Adjusting what is adjusted
// changes nothing.
func Adjust(c Container, stateDir string) (*Adjustment, error) {
	a := &Adjustment{}
	want := specs.Mount{
		Destination: ExchangeDestination,
		Type:        "bind",
		Source:      ExchangeDir(stateDir, c.Namespace, c.ID),
		Options:     []string{"rbind", "rprivate", "rw"},
	}
	there := false
	for _, m := range c.Mounts {
		switch dest := path.Clean(m.Destination); {
		case dest == ExchangeDestination && m.Source == want.Source && m.Type == want.Type:
			there = true
		case dest == ExchangeDestination, strings.HasPrefix(dest, ExchangeDestination+"/"):
			return nil, fmt.Errorf("the container has a mount of its own at %s, which kata-checkpoint needs: mount it elsewhere", m.Destination)
		}
	}
	if !there {
		a.Mounts = append(a.Mounts, want)
	}

	has, err := Externals(c.Annotations)
	if err != nil {
		return nil, err
	}
	externals := slices.Clone(has)
	for _, m := range c.Mounts {
		dest := path.Clean(m.Destination)
		// The agent finds by itself what has no name that fits the list.
		external := isBind(m) || dest == "/dev/shm"
		if external && dest != ExchangeDestination && path.IsAbs(dest) && !strings.Contains(dest, ",") && !slices.Contains(externals, dest) {
			externals = append(externals, dest)
		}
	}
	if len(externals) > len(has) {
		slices.Sort(externals)
		a.Annotations = map[string]string{AnnotationExternals: strings.Join(externals, ",")}
	}
	return a, nil
}

// Apply returns the spec's annotations and mounts with an adjustment.
func (a *Adjustment) Apply(annotations map[string]string, mounts []specs.Mount) (map[string]string, []specs.Mount) {
	annotations = maps.Clone(annotations)
	if annotations == nil && len(a.Annotations) > 0 {
		annotations = make(map[string]string)
	}
	maps.Copy(annotations, a.Annotations)
	return annotations, append(slices.Clone(mounts), a.Mounts...)
}

// Externals reads [AnnotationExternals].
func Externals(annotations map[string]string) ([]string, error) {
	var out []string
	for _, p := range strings.Split(annotations[AnnotationExternals], ",") {
		if p = strings.TrimSpace(p); p == "" {
			continue
		}
		if !path.IsAbs(p) {
			return nil, fmt.Errorf("annotation %s: %q is not an absolute path", AnnotationExternals, p)
		}
		if p = path.Clean(p); p == "/" {
			return nil, fmt.Errorf("annotation %s: the root file system cannot be external", AnnotationExternals)
		}
		out = append(out, p)
	}
	return out, nil
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}
