// SPDX-License-Identifier: Apache-2.0

// Package stopat holds an operation at one of its phases, so that a test can
// kill something there. The shim and the guest agent call [Dir.Wait] at the end
// of each phase.
//
// It does so only in binaries that are built with the tag testhooks, as the
// scenarios use them, and there only where a file in a directory of root's asks
// for it. In all others Wait is empty, and nothing of it is left in the binary.
package stopat

import "strings"

// FileName is the name of the file for a phase: operation "checkpoint" and
// phase "save /dev/shm" make checkpoint-save-devshm.
func FileName(operation, phase string) string {
	return operation + "-" + strings.NewReplacer(" ", "-", "/", "").Replace(phase)
}
