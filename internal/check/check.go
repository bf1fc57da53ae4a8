// SPDX-License-Identifier: Apache-2.0

// Package check looks at a node and says what stands in the way of a checkpoint:
// containerd, the runtime, Kata and its configuration, the guest bundle, the
// guest's kernel, and the disk. It changes nothing.
package check

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Level is how bad a finding is.
type Level int

// Levels. A Warning does not prevent a checkpoint of every container, an Error
// does.
const (
	OK Level = iota
	Warning
	Error
)

func (l Level) String() string { return [...]string{"ok", "warning", "error"}[l] }

// MarshalText is for JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText is for JSON.
func (l *Level) UnmarshalText(text []byte) error {
	for *l = OK; *l <= Error; *l++ {
		if l.String() == string(text) {
			return nil
		}
	}
	return fmt.Errorf("unknown level %q", text)
}

// Finding is one line of the answer.
type Finding struct {
	// Check is the name of what was looked at, kata.shared_fs for example. It
	// does not change between releases.
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Text is what was found and, if that is not OK, what it means.
	Text string `json:"text"`
	// Cure is a command or a setting that mends it, empty if the level is OK.
	Cure string `json:"cure,omitempty"`
	// Code is what docs/troubleshooting.md has an entry for, 0 if the level is OK.
	Code errcode.Code `json:"code,omitempty"`
}

// Findings are in the order in which they were made.
type Findings []Finding

// Worst is the highest level of them, OK if there are none.
func (f Findings) Worst() Level {
	if len(f) == 0 {
		return OK
	}
	return slices.MaxFunc(f, func(a, b Finding) int { return cmp.Compare(a.Level, b.Level) }).Level
}

func (f *Findings) ok(check, format string, args ...any) {
	*f = append(*f, Finding{Check: check, Text: fmt.Sprintf(format, args...)})
}

func (f *Findings) warn(check, cure, format string, args ...any) {
	f.add(Warning, check, cure, format, args...)
}

func (f *Findings) fail(check, cure, format string, args ...any) {
	f.add(Error, check, cure, format, args...)
}

// add adds a finding with the code of what it quotes, or that of the check.
func (f *Findings) add(level Level, check, cure, format string, args ...any) {
	text, code := errcode.Split(fmt.Sprintf(format, args...))
	for _, arg := range args {
		if err, ok := arg.(error); ok && code == 0 {
			code = errcode.Of(err)
		}
	}
	if code == 0 {
		code = findingCodes[check]
	}
	*f = append(*f, Finding{check, level, text, cure, code})
}

// findingCodes are the codes of the checks, by their names.
var findingCodes = map[string]errcode.Code{
	"containerd":               errcode.CheckContainerd,
	"containerd.version":       errcode.CheckContainerdVersion,
	"containerd.config":        errcode.CheckContainerdConfig,
	"runtime.shim":             errcode.CheckRuntimeShim,
	"runtime.handler":          errcode.CheckRuntimeHandler,
	"nri.containerd":           errcode.CheckNRI,
	"nri.plugin":               errcode.CheckNRIPlugin,
	"kata.shim":                errcode.CheckKataShim,
	"kata.config":              errcode.CheckKataConfig,
	"kata.shared_fs":           errcode.CheckSharedFS,
	"kata.sandbox_bind_mounts": errcode.CheckSandboxBindMounts,
	"kata.guest_hook_path":     errcode.CheckGuestHookPath,
	"kata.initrd":              errcode.CheckInitrd,
	"kata.kernel":              errcode.CheckKernel,
	"bundle":                   errcode.CheckBundle,
	"bundle.port":              errcode.CheckPort,
	"criu":                     errcode.CheckCRIU,
	"state_dir":                errcode.CheckStateDir,
	"state_dir.space":          errcode.CheckStateDirSpace,
	"guest":                    errcode.CheckGuest,
	"guest.start":              errcode.CheckGuestStart,
	"guest.agent":              errcode.CheckGuestAgent,
	"guest.criu":               errcode.CheckGuestCRIU,
	"guest.virtiofs":           errcode.CheckGuestVirtiofs,
	"guest.kernel":             errcode.CheckGuestKernel,
	"guest.checkpoint":         errcode.CheckGuestCheckpoint,
	"guest.remove":             errcode.CheckGuestRemove,
	"container":                errcode.CheckContainer,
	"container.checkpoint":     errcode.CheckContainerCheckpoint,
	"container.space":          errcode.CheckContainerSpace,
}

// Run makes all checks of the host. What cannot be looked at because something
// else is missing is left out: that finding names the cure.
func (h *Host) Run(ctx context.Context) Findings {
	var f Findings
	cd := h.containerd(ctx, &f)
	h.runtime(cd, &f)
	h.nri(cd, &f)
	h.kata(ctx, cd, &f)
	h.bundle(ctx, &f)
	h.criu(ctx, cd, &f)
	h.stateDir(&f)
	return f
}
