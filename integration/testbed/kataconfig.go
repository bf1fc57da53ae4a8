// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	_ "embed"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// The stand-in's configurations have the tables and keys of Kata's that the
// stand-in or the edits below use.
var (
	//go:embed templates/standin-go.toml
	standinGo string
	//go:embed templates/standin-rust.toml
	standinRust string
)

// kataSettings is what a testbed changes in Kata's configuration.
type kataSettings struct {
	VMM         string // used as the hypervisor
	Virtiofsd   string
	Kernel      string
	Initrd      string
	GuestMounts string
	GuestBundle string // empty: none
	Way         Way
	NoNetwork   bool
}

// wayOf returns which shim a configuration is for: only the Rust shim's names
// its components in the table runtime.
func wayOf(configuration string) Way {
	e := newEditor(configuration)
	if e.has("runtime", "hypervisor_name") || e.hasTable("hypervisor.cloud-hypervisor") {
		return Rust
	}
	return Go
}

// guestHooks is where a guest of either way finds the bundle's hooks: in the
// share's directory for sandbox_bind_mounts.
func guestHooks(way Way, bundleName string) string {
	share := "/run/kata-containers/shared/containers"
	if way == Rust {
		share += "/passthrough"
	}
	return share + "/sandbox-mounts/" + bundleName + "/hooks"
}

// deriveKataConfig edits a Kata configuration for Cloud Hypervisor so that it
// runs on the testbed's VM. Everything else, comments included, stays as it is.
func deriveKataConfig(configuration string, s kataSettings) (string, error) {
	e := newEditor(configuration)
	hypervisor := e.firstTable("hypervisor.")
	if hypervisor == "" {
		return "", fmt.Errorf("kata configuration: no hypervisor table")
	}
	text, list := strconv.Quote, func(s string) string { return "[" + strconv.Quote(s) + "]" }
	params := e.get(hypervisor, "kernel_params")
	if unquoted, err := strconv.Unquote(params); err == nil {
		params = unquoted
	}
	e.set(hypervisor, "kernel_params", text(strings.TrimSpace(params+" testbed.mounts="+s.GuestMounts)))
	e.set(hypervisor, "path", text(s.VMM))
	e.set(hypervisor, "valid_hypervisor_paths", list(s.VMM))
	e.set(hypervisor, "virtio_fs_daemon", text(s.Virtiofsd))
	e.set(hypervisor, "valid_virtio_fs_daemon_paths", list(s.Virtiofsd))
	e.set(hypervisor, "kernel", text(s.Kernel))
	e.set(hypervisor, "initrd", text(s.Initrd))
	for _, key := range []string{"image", "rootfs_type", "vm_rootfs_driver"} { // an image or an initrd, not both
		e.remove(hypervisor, key)
	}
	e.set(hypervisor, "default_memory", "1536")
	e.set(hypervisor, "disable_seccomp", "true") // the filter would be Cloud Hypervisor's
	// A guest under TCG is slow, even more so on a loaded machine.
	e.set("agent.kata", "debug_console_enabled", "true")
	if s.Way == Rust {
		e.set("agent.kata", "dial_timeout_ms", "500")
		e.set("agent.kata", "reconnect_timeout_ms", "60000")
		e.set("agent.kata", "create_container_timeout", "90")
	} else {
		e.set("agent.kata", "dial_timeout", "90")
		e.set("runtime", "create_container_timeout", "90")
	}
	if s.NoNetwork {
		e.set("runtime", "disable_new_netns", "true")
		e.set("runtime", "internetworking_model", text("none")) // Kata's Go shim requires it
	}
	if s.GuestBundle != "" {
		name := s.GuestBundle[strings.LastIndex(s.GuestBundle, "/")+1:]
		e.set("runtime", "sandbox_bind_mounts", list(s.GuestBundle))
		e.set(hypervisor, "guest_hook_path", text(guestHooks(s.Way, name)))
	}
	return e.String(), nil
}

// editor changes single lines of a TOML file in which each value is on one
// line, as in all of Kata's.
type editor struct{ lines []string }

var (
	tableLine = regexp.MustCompile(`^\s*\[([^\[\]]+)\]\s*(#.*)?$`)
	keyLine   = regexp.MustCompile(`^\s*([A-Za-z0-9_-]+)\s*=\s*(.*?)\s*$`)
)

func newEditor(text string) *editor { return &editor{strings.Split(text, "\n")} }

func (e *editor) String() string { return strings.Join(e.lines, "\n") }

// find returns the line of a table's header and of a key in it, or -1.
func (e *editor) find(table, key string) (header, line int) {
	header = -1
	current := ""
	for i, text := range e.lines {
		if m := tableLine.FindStringSubmatch(text); m != nil {
			current = strings.TrimSpace(m[1])
			if current == table {
				header = i
			}
			continue
		}
		if current != table {
			continue
		}
		if m := keyLine.FindStringSubmatch(text); m != nil && m[1] == key {
			return header, i
		}
	}
	return header, -1
}

func (e *editor) firstTable(prefix string) string {
	for _, text := range e.lines {
		if m := tableLine.FindStringSubmatch(text); m != nil && strings.HasPrefix(strings.TrimSpace(m[1]), prefix) {
			return strings.TrimSpace(m[1])
		}
	}
	return ""
}

func (e *editor) hasTable(table string) bool {
	header, _ := e.find(table, "")
	return header >= 0
}

func (e *editor) has(table, key string) bool {
	_, line := e.find(table, key)
	return line >= 0
}

// get returns a key's value as it is written, or an empty string.
func (e *editor) get(table, key string) string {
	_, line := e.find(table, key)
	if line < 0 {
		return ""
	}
	return keyLine.FindStringSubmatch(e.lines[line])[2]
}

// set replaces a key's line, or adds one right below the table's header, or the
// table at the end.
func (e *editor) set(table, key, value string) {
	text := key + " = " + value
	header, line := e.find(table, key)
	switch {
	case line >= 0:
		e.lines[line] = text
	case header >= 0:
		e.lines = append(e.lines[:header+1], append([]string{text}, e.lines[header+1:]...)...)
	default:
		e.lines = append(e.lines, "["+table+"]", text)
	}
}

func (e *editor) remove(table, key string) {
	if _, line := e.find(table, key); line >= 0 {
		e.lines = append(e.lines[:line], e.lines[line+1:]...)
	}
}
