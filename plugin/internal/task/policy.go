// SPDX-License-Identifier: Apache-2.0

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
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
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

// decodeOptions decodes the options of a checkpoint. Engines that send them
// only to runc send none here.
func decodeOptions(a *anypb.Any) (*options.CheckpointOptions, error) {
	if a == nil || a.GetTypeUrl() == "" {
		return nil, nil //nolint:nilnil // no options differ from empty ones
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		return nil, errclass.Invalid(errcode.OptionUnknown, "checkpoint options: %w", err)
	}
	opts, ok := v.(*options.CheckpointOptions)
	if !ok {
		return nil, errclass.Invalid(errcode.OptionUnknown, "unknown type %s of checkpoint options: send containerd.runc.v1.CheckpointOptions or none", a.GetTypeUrl())
	}
	return opts, nil
}

// criuOptions returns the options for CRIU, and refuses those that have no
// meaning in a guest.
func criuOptions(opts *options.CheckpointOptions, of map[string]string) (*api.CheckpointOptions, error) {
	if p := opts.GetParentPath(); p != "" {
		return nil, errclass.Invalid(errcode.OptionUnknown, "a checkpoint based on an earlier one (parent path %s) is not supported: an image set contains the whole container", p)
	}
	if m := opts.GetCgroupsMode(); m != "" && m != "ignore" {
		return nil, errclass.Invalid(errcode.OptionUnknown, "cgroups mode %q is not supported: Kata recreates the cgroups in the guest", m)
	}
	for _, ns := range opts.GetEmptyNamespaces() {
		if ns != "network" {
			return nil, errclass.Invalid(errcode.OptionUnknown, "empty namespace %q is not supported, only network is", ns)
		}
	}
	tcp, err := annotations.TCP(of)
	if err != nil {
		return nil, errclass.Invalid(errcode.Annotation, "%w", err)
	}
	address, err := annotations.Address(of)
	if err != nil {
		return nil, errclass.Invalid(errcode.Annotation, "%w", err)
	}
	// File locks are included whatever the engine says: ctr task checkpoint has
	// no option for them, and CRIU refuses a container with a lock otherwise.
	return &api.CheckpointOptions{
		TcpEstablished:      opts.GetOpenTcp() && tcp != annotations.TCPClose || tcp == annotations.TCPEstablished,
		TcpClose:            tcp == annotations.TCPClose,
		ExternalUnixSockets: opts.GetExternalUnixSockets(),
		Terminal:            opts.GetTerminal(),
		FileLocks:           true,
		EmptyNamespaces:     opts.GetEmptyNamespaces(),
		AddressStays:        address == annotations.AddressStays,
	}, nil
}

// quoteArgs quotes a command line for an error.
func quoteArgs(args []string) string {
	const limit = 120
	s := strings.Join(args, " ")
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return "`" + s + "`"
}
