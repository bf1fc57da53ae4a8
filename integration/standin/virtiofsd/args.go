// Package virtiofsd translates the arguments of the virtiofsd written in Rust,
// which is what Kata's shims give, into those of the one written in C that
// Debian 12 has in qemu-system-common. The program testbed-virtiofsd is its
// only caller.
package virtiofsd

import (
	"fmt"
	"strings"
)

// Daemon is where Debian's qemu-system-common puts the C daemon.
const Daemon = "/usr/lib/qemu/virtiofsd"

// kind says what becomes of an option.
type kind int

const (
	drop      kind = iota // a flag that the C daemon does not need
	dropValue             // the same, with a value
	keep                  // a flag of the same name
	keepValue             // an option of the same name, given as --name=value
	mount                 // a flag that is a mount option there: -o name
	mountValue
	cache
)

type option struct {
	kind kind
	name string // in the C daemon
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
	"sandbox":            {dropValue, ""}, // namespace is the default of both, and none does not exist
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

// Arguments translates. An option that it does not know is an error, so that a
// new release of Kata cannot lose one unnoticed.
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
			// The old way to give options, which the Rust daemon still takes:
			// the C daemon's own.
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

// The C daemon has no mode that caches metadata alone: without a cache at all
// the guest at least sees nothing stale.
var cacheModes = map[string]string{"auto": "auto", "always": "always", "never": "none", "metadata": "none", "none": "none"}
