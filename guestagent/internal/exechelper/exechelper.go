// SPDX-License-Identifier: Apache-2.0

// Package exechelper is what the agent and the exec helper agree on. The exec
// helper (guestagent/helper) is the process that Kata starts for an exec into a
// restored container. Kata puts it into the placeholder's namespaces, where the
// restored processes are not; so it only holds the stdio and the exit status,
// while the agent, which is root, starts the real process on copies of the
// helper's descriptors (package enter).
//
// The helper trusts nothing and opens nothing: the agent finds it by what it is
// and takes the descriptors itself (pidfd_getfd). No socket is involved that a
// container could reach.
package exechelper

import "encoding/binary"

// StatusFD is the descriptor in the helper that the agent writes to: the write
// end of a pipe. Once it is there, so is all else that the agent takes.
const StatusFD = 200

// Message is what the agent writes: first the pid of the real process in the
// placeholder's PID namespace, then its wait status.
type Message struct {
	PID    int32
	Ended  uint32
	Status uint32
}

// Encode returns a message as the helper reads it, in one piece.
func (m Message) Encode() []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(m.PID)) //nolint:gosec // its bits
	b = binary.NativeEndian.AppendUint32(b, m.Ended)
	return binary.NativeEndian.AppendUint32(b, m.Status)
}
