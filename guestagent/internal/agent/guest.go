// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// cpuFeatures are the instruction set extensions of the guest's processor: a
// process that found one at its start may use it indefinitely.
func cpuFeatures() ([]string, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		name, value, ok := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); !ok || name != "flags" && name != "Features" {
			continue
		}
		var out []string
		for f := range strings.FieldsSeq(value) {
			if instructionSet(f) {
				out = append(out, f)
			}
		}
		slices.Sort(out)
		return out, nil
	}
	return nil, nil
}

// instructionSet leaves out what only the kernel or the VMM sees of a
// processor, so that a restore is not refused for it.
func instructionSet(flag string) bool {
	for _, prefix := range []string{"sse", "ssse", "avx", "amx", "bmi", "fma", "xsave", "sha", "aes", "vaes", "vpclmul", "asimd", "sve"} {
		if strings.HasPrefix(flag, prefix) {
			return true
		}
	}
	return slices.Contains([]string{"fpu", "mmx", "fxsr", "pni", "popcnt", "pclmulqdq", "movbe", "rdrand", "rdseed", "adx", "abm", "lahf_lm",
		"cx16", "cx8", "cmov", "f16c", "gfni", "fsgsbase", "rdpid", "rdtscp", "movdiri", "movdir64b", "clflushopt", "clwb", "fp", "crc32", "atomics",
		"pmull", "serialize", "waitpkg", "3dnow", "3dnowext", "3dnowprefetch", "tbm", "xop", "fma4", "sme", "sme2"}, flag)
}
