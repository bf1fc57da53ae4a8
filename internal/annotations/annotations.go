// SPDX-License-Identifier: Apache-2.0

// Package annotations knows the annotations of containers that kata-checkpoint
// reads or writes, its own and those of the CRI implementations, and parses
// them. Its functions are pure: the shim, the NRI plugin and the tests get the
// same answer from the same annotations, at whatever time they ask.
//
// Written against containerd 2.4 (internal/cri/annotations) and Kata Containers
// 4.1.0 (src/libs/kata-types/src/k8s.rs), whose answer to what a container is
// must be ours.
package annotations

import (
	"path"
	"strconv"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Keys of kata-checkpoint's own annotations.
const (
	// Prefix starts all of them.
	Prefix = "kata-checkpoint.dev/"

	// AfterKey is set on a container by its user: what becomes of the container
	// after a checkpoint, [Stop] or [LeaveRunning]. It overrides what the
	// engine asks for.
	AfterKey = Prefix + "after"

	// TCPKey is set on a container by its user: what becomes of its TCP
	// connections, [TCPEstablished] or [TCPClose], for engines that have no
	// option for it.
	TCPKey = Prefix + "tcp"

	// AddressKey is set on a container by its user, to [AddressStays]: whatever
	// address its sockets are bound to, the container that it is restored to has it.
	AddressKey = Prefix + "address"

	// ThawKey is set on a container by its user: when a container that an engine
	// has paused for a checkpoint runs again, [AfterDump] or [AtResume].
	ThawKey = Prefix + "thaw"

	// PreDumpKey is set on a container by its user: how often its memory is copied
	// before a checkpoint freezes it, see [PreDumps].
	PreDumpKey = Prefix + "pre-dump"

	// ExternalMountsKey lists, separated by commas, mount points whose content
	// stays out of the image set. Users may set it; the adjustment (package
	// adjust) adds what the host knows to be external.
	ExternalMountsKey = Prefix + "external-mounts"

	// RestorePrefix, followed by the name of a container, is the key of an
	// annotation of that container's pod. Its value is the name of a checkpoint
	// archive in restore_dir, from which the container starts the first time.
	RestorePrefix = Prefix + "restore."

	// NRIKey marks a container that the NRI plugin has adjusted; its value is
	// the plugin's version. It only serves the log: the shim adds whatever is
	// missing in any case, so that nobody gains anything by setting it.
	NRIKey = Prefix + "nri"
)

// Values of [AfterKey]; after_checkpoint and after_checkpoint_cri in
// config.toml have the same.
const (
	Stop         = "stop"
	LeaveRunning = "leave-running"
)

// Values of [TCPKey].
const (
	TCPEstablished = "established"
	TCPClose       = "close"
)

// Values of [ThawKey]; thaw in config.toml has the same.
const (
	AfterDump = "after-dump"
	AtResume  = "at-resume"
)

// AddressStays is the value of [AddressKey].
const AddressStays = "stays"

// Address parses [AddressKey]. It returns "" where a container lacks it.
func Address(annotations map[string]string) (string, error) {
	value, ok := annotations[AddressKey]
	if ok && value != AddressStays {
		return "", errcode.Annotation.Errorf("annotation %s is %q and must be %q", AddressKey, value, AddressStays)
	}
	return value, nil
}

// After parses [AfterKey]. It returns "" where a container lacks it.
func After(annotations map[string]string) (string, error) {
	return oneOf(annotations, AfterKey, Stop, LeaveRunning)
}

// TCP parses [TCPKey]. It returns "" where a container lacks it.
func TCP(annotations map[string]string) (string, error) {
	return oneOf(annotations, TCPKey, TCPEstablished, TCPClose)
}

// Thaw parses [ThawKey]. It returns "" where a container lacks it.
func Thaw(annotations map[string]string) (string, error) {
	return oneOf(annotations, ThawKey, AfterDump, AtResume)
}

// Values of [PreDumpKey] beside a number; pre_dump and pre_dump_cri in
// config.toml have the same.
const (
	PreDumpOff  = "off"
	PreDumpAuto = "auto"
)

// MaxPreDumps is how often the memory of a container is copied at most before a
// checkpoint.
const MaxPreDumps = 16

// PreDump parses [PreDumpKey]. It returns false where a container lacks it.
func PreDump(annotations map[string]string) (rounds int, ok bool, err error) {
	value, ok := annotations[PreDumpKey]
	if !ok {
		return 0, false, nil
	}
	if rounds, err = PreDumps(value); err != nil {
		return 0, false, errcode.Annotation.Errorf("annotation %s is %w", PreDumpKey, err)
	}
	return rounds, true, nil
}

// PreDumps returns how many rounds a value stands for at most: none for
// [PreDumpOff], [MaxPreDumps] for [PreDumpAuto], or the number that it is. Rounds
// end earlier where more of them gain nothing.
func PreDumps(value string) (int, error) {
	switch value {
	case PreDumpOff:
		return 0, nil
	case PreDumpAuto:
		return MaxPreDumps, nil
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 || n > MaxPreDumps || strconv.Itoa(n) != value {
		return 0, errcode.Annotation.Errorf("%q and must be %q, %q or a number from 1 to %d", value, PreDumpOff, PreDumpAuto, MaxPreDumps)
	}
	return n, nil
}

func oneOf(annotations map[string]string, key, a, b string) (string, error) {
	value, ok := annotations[key]
	if ok && value != a && value != b {
		return "", errcode.Annotation.Errorf("annotation %s is %q and must be %q or %q", key, value, a, b)
	}
	return value, nil
}

// ExternalMounts parses [ExternalMountsKey] into clean absolute paths.
func ExternalMounts(annotations map[string]string) ([]string, error) {
	var out []string
	for p := range strings.SplitSeq(annotations[ExternalMountsKey], ",") {
		if p = strings.TrimSpace(p); p == "" {
			continue
		}
		if !path.IsAbs(p) {
			return nil, errcode.Annotation.Errorf("annotation %s: %q is not an absolute path", ExternalMountsKey, p)
		}
		if p = path.Clean(p); p == "/" {
			return nil, errcode.Annotation.Errorf("annotation %s: the root file system cannot be external", ExternalMountsKey)
		}
		out = append(out, p)
	}
	return out, nil
}

// RestoreArchive returns the name of the checkpoint archive that a pod's
// annotations name for the container that they are on, "" where they name
// none.
func RestoreArchive(annotations map[string]string) string {
	name := ContainerName(annotations)
	if name == "" {
		return ""
	}
	return annotations[RestorePrefix+name]
}
