// SPDX-License-Identifier: Apache-2.0

// Package configs has the files of this directory that the command
// kata-checkpoint writes or prints.
package configs

import _ "embed"

// Config is config.toml: every setting with its default.
//
//go:embed config.toml
var Config string

// KernelFragment has the options that the guest kernel needs.
//
//go:embed kernel/kata-checkpoint.conf
var KernelFragment string

// RuntimeClass is the RuntimeClass of Kubernetes for our runtime handler.
//
//go:embed kubernetes/runtimeclass.yaml
var RuntimeClass string
