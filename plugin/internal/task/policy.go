package task

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// annotationTCP on a container says what becomes of its TCP connections, for
// engines that cannot: "established" keeps them, "close" closes them.
const annotationTCP = adjust.AnnotationPrefix + "tcp"

// afterCheckpoint says whether a container is to be stopped after a
// checkpoint. Options are nil where the engine sent none.
func afterCheckpoint(opts *options.CheckpointOptions, annotations map[string]string, cfg *config.Config) (stop bool, err error) {
	value, ok := annotations[adjust.AnnotationAfter]
	switch {
	case ok && value != config.AfterStop && value != config.AfterLeaveRunning:
		return false, fmt.Errorf("annotation %s is %q and must be %q or %q", adjust.AnnotationAfter, value, config.AfterStop, config.AfterLeaveRunning)
	case ok:
		return value == config.AfterStop, nil
	case opts != nil:
		return opts.GetExit(), nil
	case bundle.MadeByCRI(annotations):
		return cfg.AfterCheckpointCRI == config.AfterStop, nil
	default:
		return cfg.AfterCheckpoint == config.AfterStop, nil
	}
}

// tcpPolicy reads [annotationTCP].
func tcpPolicy(annotations map[string]string) (string, error) {
	value, ok := annotations[annotationTCP]
	if ok && value != "established" && value != "close" {
		return "", fmt.Errorf("annotation %s is %q and must be %q or %q", annotationTCP, value, "established", "close")
	}
	return value, nil
}

// decodeOptions reads the options of a checkpoint; engines that mean another
// runtime than ours send none.
func decodeOptions(a *anypb.Any) (*options.CheckpointOptions, error) {
	if a == nil || a.GetTypeUrl() == "" {
		return nil, nil //nolint:nilnil // no options are something else than empty ones
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		return nil, errclass.Invalid("checkpoint options: %w", err)
	}
	opts, ok := v.(*options.CheckpointOptions)
	if !ok {
		return nil, errclass.Invalid("checkpoint options of type %s are not known: send containerd.runc.v1.CheckpointOptions or none", a.GetTypeUrl())
	}
	return opts, nil
}

// criuOptions says how CRIU is to be run, or refuses what has no meaning in a
// guest.
func criuOptions(opts *options.CheckpointOptions, annotations map[string]string) (*api.CheckpointOptions, error) {
	if opts == nil {
		// As containerd's client sets it for runc.
		opts = &options.CheckpointOptions{FileLocks: true}
	}
	if p := opts.GetParentPath(); p != "" {
		return nil, errclass.Invalid("a checkpoint on top of an earlier one (parent path %s) is not supported: an image set holds the whole container", p)
	}
	if m := opts.GetCgroupsMode(); m != "" && m != "ignore" {
		return nil, errclass.Invalid("cgroups mode %q is not supported: the cgroups in the guest are Kata's, which makes them anew", m)
	}
	for _, ns := range opts.GetEmptyNamespaces() {
		if ns != "network" {
			return nil, errclass.Invalid("empty namespace %q is not supported, only network is", ns)
		}
	}
	tcp, err := tcpPolicy(annotations)
	if err != nil {
		return nil, errclass.Invalid("%w", err)
	}
	return &api.CheckpointOptions{
		TcpEstablished:      opts.GetOpenTcp() && tcp != "close" || tcp == "established",
		TcpClose:            tcp == "close",
		ExternalUnixSockets: opts.GetExternalUnixSockets(),
		Terminal:            opts.GetTerminal(),
		FileLocks:           opts.GetFileLocks(),
		EmptyNamespaces:     opts.GetEmptyNamespaces(),
	}, nil
}

// What the CRI says of a container, in containerd's words and in CRI-O's: the
// container's image, its name in the pod, and its pod's namespace and UID.
func imageName(annotations map[string]string) string {
	return firstOf(annotations, "io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
}

func containerName(annotations map[string]string) string {
	return firstOf(annotations, "io.kubernetes.cri.container-name", "io.kubernetes.container.name")
}

func podNamespace(annotations map[string]string) string {
	return firstOf(annotations, "io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")
}

func podUID(annotations map[string]string) string {
	return firstOf(annotations, "io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid")
}

func firstOf(annotations map[string]string, keys ...string) string {
	for _, key := range keys {
		if v := annotations[key]; v != "" {
			return v
		}
	}
	return ""
}

// quoteArgs shows a command line in an error.
func quoteArgs(args []string) string {
	const limit = 120
	s := strings.Join(args, " ")
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return "`" + s + "`"
}
