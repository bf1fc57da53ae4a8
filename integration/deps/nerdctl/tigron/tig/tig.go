// SPDX-License-Identifier: Apache-2.0

// Package tig stands for one of that name in a module which only helpers for nerdctl's tests use. They are compiled with nerdctl and never run.
package tig

// T is what of testing.T the helpers call.
type T interface {
	Helper()
	FailNow()
	Fail()
	Log(args ...any)
	Name() string
	TempDir() string
}
