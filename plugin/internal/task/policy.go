package task

import (
	"strings"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// stopsAfterCheckpoint reports whether a container is to be stopped after a
// checkpoint. Options are nil where the engine sent none.
func stopsAfterCheckpoint(opts *options.CheckpointOptions, of map[string]string, cfg *config.Config) (stop bool, err error) {
	after, err := annotations.After(of)
	switch {
	case err != nil:
		return false, err
	case after != "":
		return after == annotations.Stop, nil
	case opts != nil:
		return opts.GetExit(), nil
	case annotations.MadeByCRI(of):
		return cfg.AfterCheckpointCRI == annotations.Stop, nil
	default:
		return cfg.AfterCheckpoint == annotations.Stop, nil
	}
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
func criuOptions(opts *options.CheckpointOptions, of map[string]string) (*api.CheckpointOptions, error) {
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
	tcp, err := annotations.TCP(of)
	if err != nil {
		return nil, errclass.Invalid("%w", err)
	}
	return &api.CheckpointOptions{
		TcpEstablished:      opts.GetOpenTcp() && tcp != annotations.TCPClose || tcp == annotations.TCPEstablished,
		TcpClose:            tcp == annotations.TCPClose,
		ExternalUnixSockets: opts.GetExternalUnixSockets(),
		Terminal:            opts.GetTerminal(),
		FileLocks:           opts.GetFileLocks(),
		EmptyNamespaces:     opts.GetEmptyNamespaces(),
	}, nil
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
