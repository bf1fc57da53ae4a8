// SPDX-License-Identifier: Apache-2.0

// Package virtiofsd translates the arguments of the Rust virtiofsd, which
// Kata's shims use, into those of the C virtiofsd in Debian 12's
// qemu-system-common. The program testbed-virtiofsd is its only caller.
package virtiofsd

import (
	"fmt"
	"strings"
)

// Daemon is the path of the C daemon from Debian's qemu-system-common.
const Daemon = "/usr/lib/qemu/virtiofsd"

// kind is how an option is translated.
type kind int

const (
	drop      kind = iota // a flag that the C daemon does not need
	dropValue             // the same, for an option with a value
	keep                  // a flag of the same name
	keepValue             // an option of the same name, given as --name=value
	mount                 // a flag that is a mount option there: -o name
	mountValue
	cache
)

type option struct {
	kind kind
	name string // of the C daemon's option
}

var options = map[string]option{
	"shared-dir":         {mountValue, "source"},
	"cache":              {cache, "cache"},
	"socket-path":        {keepValue, "socket-path"},
	"socket-group":       {keepValue, "socket-group"},
	"fd":                 {keepValue, "fd"},
	"thread-pool-size":   {keepValue, "thread-pool-size"},
	"rlimit-nofile":      {keepValue, "rlimit-nofile"},
	"syslog":             {keep, "syslog"},
	"announce-submounts": {mount, "announce_submounts"},
	"xattr":              {mount, "xattr"},
	"posix-acl":          {mount, "posix_acl"},
	"security-label":     {mount, "security_label"},
	"writeback":          {mount, "writeback"},
	"allow-direct-io":    {mount, "allow_direct_io"},
	"no-readdirplus":     {mount, "no_readdirplus"},
	"killpriv-v2":        {mount, "killpriv_v2"},
	"no-killpriv-v2":     {mount, "no_killpriv_v2"},
	"xattrmap":           {mountValue, "xattrmap"},
	"modcaps":            {mountValue, "modcaps"},
	"log-level":          {mountValue, "log_level"},
	"sandbox":            {dropValue, ""}, // namespace is the default of both, the C daemon has no none
	"seccomp":            {dropValue, ""},
	"inode-file-handles": {dropValue, ""},
	"preserve-noatime":   {drop, ""},
	"allow-mmap":         {drop, ""},
	"print-capabilities": {keep, "print-capabilities"},
	"version":            {keep, "version"},
	"readdirplus":        {mount, "readdirplus"},
	"translate-uid":      {dropValue, ""},
	"translate-gid":      {dropValue, ""},
}

// Arguments translates arguments. An unknown option is an error, so that a new
// option of Kata's cannot be lost unnoticed.
func Arguments(rust []string) ([]string, error) {
	out := []string{"-f"}
	for i := 0; i < len(rust); i++ {
		value := func(name, attached string, given bool) (string, error) {
			if given {
				return attached, nil
			}
			if i++; i == len(rust) {
				return "", fmt.Errorf("option %s lacks its value", name)
			}
			return rust[i], nil
		}
		arg := rust[i]
		if arg == "-f" {
			continue
		}
		if rest, ok := strings.CutPrefix(arg, "-o"); ok {
			// The C daemon's syntax, which the Rust daemon still accepts.
			v, err := value("-o", rest, rest != "")
			if err != nil {
				return nil, err
			}
			out = append(out, "-o", v)
			continue
		}
		name, attached, given := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		o, ok := options[name]
		if !ok || !strings.HasPrefix(arg, "--") {
			return nil, fmt.Errorf("unknown argument %q", arg)
		}
		var v string
		switch o.kind {
		case dropValue, keepValue, mountValue, cache:
			var err error
			if v, err = value(arg, attached, given); err != nil {
				return nil, err
			}
		}
		switch o.kind {
		case keep:
			out = append(out, "--"+o.name)
		case keepValue:
			out = append(out, "--"+o.name+"="+v)
		case mount:
			out = append(out, "-o", o.name)
		case mountValue:
			out = append(out, "-o", o.name+"="+v)
		case cache:
			mode, ok := cacheModes[v]
			if !ok {
				return nil, fmt.Errorf("unknown cache mode %q", v)
			}
			out = append(out, "-o", "cache="+mode)
		}
	}
	return out, nil
}

// The C daemon cannot cache only metadata; without a cache the guest at least
// sees nothing stale.
var cacheModes = map[string]string{"auto": "auto", "always": "always", "never": "none", "metadata": "none", "none": "none"}
