// Package api is the protocol between the shim on the host (package plugin,
// the caller) and the agent in the guest (package guestagent, the server). It
// is the only package that both sides share besides internal ones.
package api

const (
	// ProtocolVersion is raised with every change that an older peer would
	// misunderstand. Shim and agent must have the same.
	ProtocolVersion = 1

	// DefaultPort is the AF_VSOCK port that the agent listens on. Kata's own
	// agent takes 1024 to 1027 (src/libs/kata-types/src/config/default.rs).
	DefaultPort = 10750

	// MarkerName is the file in an exchange directory whose content is the
	// token of AdoptRequest: by it the agent knows that it holds the right mount.
	MarkerName = ".exchange"
)
