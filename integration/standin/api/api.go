// SPDX-License-Identifier: Apache-2.0

// Package api is the protocol between the stand-in for Kata's shim and the
// stand-in for Kata's agent. It is private to the two: the product does not use
// it.
package api

// Port is the agent's vsock port, the same as Kata's.
const Port = 1024

// DebugConsolePort is the vsock port of a shell, if agent.debug_console is on
// the kernel's command line, as with Kata's agent.
const DebugConsolePort = 1026

// Tag is the virtiofs tag of the share, GuestShare its mount point in the
// guest.
const (
	Tag        = "kataShared"
	GuestShare = "/run/kata-containers/shared/containers"
)

// GuestShm is the tmpfs that the containers of a sandbox share as /dev/shm.
const GuestShm = "/run/kata-containers/sandbox/shm"

// MaxChunk bounds the data of one stream message; ttrpc accepts messages of up
// to 4 MiB.
const MaxChunk = 64 << 10
