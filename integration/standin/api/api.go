// Package api is the protocol between the stand-in for Kata's shim and the
// stand-in for Kata's agent. It is private to the two: the product talks to
// neither of them by it.
package api

// Port is the vsock port that the agent listens on, Kata's own.
const Port = 1024

// DebugConsolePort gives a shell where agent.debug_console is on the kernel's
// command line, as Kata's agent does.
const DebugConsolePort = 1026

// Tag is the virtiofs tag of the share; GuestShare is where the agent mounts
// it.
const (
	Tag        = "kataShared"
	GuestShare = "/run/kata-containers/shared/containers"
)

// GuestShm is the tmpfs that the containers of a sandbox have in common as
// /dev/shm.
const GuestShm = "/run/kata-containers/sandbox/shm"

// MaxChunk bounds the data of one stream message; ttrpc takes 4 MiB a message.
const MaxChunk = 64 << 10
