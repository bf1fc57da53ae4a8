// SPDX-License-Identifier: Apache-2.0

// Package version is the version of this build of kata-checkpoint. The shim and
// the agent both report it, so that an error can name both when they do not
// match.
package version

// Version is set at link time (see the Makefile), from `git describe`.
var Version = "dev"
