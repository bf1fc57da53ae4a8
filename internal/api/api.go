// SPDX-License-Identifier: Apache-2.0

// Package api is the protocol between the shim on the host (package
// plugin/internal/task, by way of plugin/internal/guest) and the agent in the
// guest (package guestagent/internal/agent), and everything else that the two
// have to agree on: the modes of the agent's binary, and the paths and names
// in the guest. It imports nothing of this module.
package api

const (
	// ProtocolVersion is raised with every change that an older peer would
	// misunderstand.
	ProtocolVersion = 1
	// OldestProtocol is the oldest version that this release still speaks: that
	// of the minor release before it (RELEASES.md). VMs that run during an
	// upgrade keep their agent.
	OldestProtocol = 1

	// DefaultPort is the AF_VSOCK port that the agent listens on. kata-agent
	// listens on 1024 to 1027 (Kata 4.1.0,
	// src/libs/kata-types/src/config/default.rs).
	DefaultPort = 10750
)

// What the shim has Kata execute at [HelperPath], by the first argument.
const (
	// PlaceholderMode is one of the agent's binary and has no further argument.
	PlaceholderMode = "placeholder"
	// ExecMode is one of the exec helper and has one, the token (ExecRequest).
	ExecMode = "exec"
)

// Names on the host.
const (
	// AgentBinary is the agent's binary in the guest bundle.
	AgentBinary = "bin/kata-checkpoint-agent"

	// MarkerName is the file in an exchange directory whose content is the
	// token of AdoptRequest: it proves to the agent that it has the right mount.
	MarkerName = ".exchange"

	// FoldedName is the file with the message FoldedFiles in a directory of images.
	FoldedName = "folded"

	// LogSuffix is what the name of CRIU's log of a restore that failed has in
	// addition to that of RestoreRequest's directory, beside which it is.
	LogSuffix = ".log"
)

// Paths in a container.
const (
	// ExchangeDestination is where the exchange mount is until the container
	// starts. It lies in the root directory, where its mount point leaves no
	// trace once both are withdrawn.
	ExchangeDestination = "/.kata-checkpoint"

	// HelperPath is where the agent's binary is in a restored container, and over
	// it, from the restore on, the exec helper. It lies below /dev, a file system
	// of its own, where a mount point leaves no trace in the root file system.
	// Kata shares regular files there.
	HelperPath = "/dev/.kata-checkpoint"
)

// StateDir is the agent's directory in the guest, a private mount in memory.
const StateDir = "/run/kata-checkpoint"
