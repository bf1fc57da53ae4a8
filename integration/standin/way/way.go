// SPDX-License-Identifier: Apache-2.0

// Package way names Kata's two shims, written in Go and in Rust, and the file
// names in which they differ. It has no side effects. Kata 4.1.0.
package way

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Way is which of Kata's shims is imitated.
type Way string

const (
	// Go is Kata's src/runtime.
	Go Way = "go"
	// Rust is Kata's src/runtime-rs, the default since Kata 4.0.
	Rust Way = "rust"
)

// Env selects the way if nothing else does.
const Env = "STANDIN_WAY"

// Parse returns the way with a name.
func Parse(name string) (Way, error) {
	switch w := Way(name); w {
	case Go, Rust:
		return w, nil
	}
	return "", fmt.Errorf("unknown way %q, want go or rust", name)
}

// OfBinary returns the way before any configuration is known: `start` derives
// its socket's name from it. The environment takes precedence over the name of
// the binary's directory.
func OfBinary(executable string) (Way, error) {
	if name := os.Getenv(Env); name != "" {
		return Parse(name)
	}
	w, err := Parse(filepath.Base(filepath.Dir(executable)))
	if err != nil {
		return "", fmt.Errorf("%s is not in a directory named go or rust, and %s is not set", executable, Env)
	}
	return w, nil
}

// socketRoot is where both of Kata's shims listen, whatever containerd's state
// directory is.
const socketRoot = "/run/containerd/s"

// Address is the shim's address: a digest of the -address flag, the namespace
// and the sandbox, in lower case hex in Go, in upper case in Rust.
func (w Way) Address(containerd, namespace, sandbox string) string {
	sum := sha256.Sum256([]byte(filepath.Join(containerd, namespace, sandbox)))
	name := fmt.Sprintf("%x", sum)
	if w == Rust {
		name = strings.ToUpper(name)
	}
	return "unix://" + filepath.Join(socketRoot, name)
}

// VMDir is the directory of the VM's sockets.
func (w Way) VMDir(sandbox string) string {
	if w == Rust {
		return filepath.Join("/run/kata", sandbox)
	}
	return filepath.Join("/run/vc/vm", sandbox)
}

// StateDir is the directory of the sandbox's management socket.
func (w Way) StateDir(sandbox string) string {
	if w == Rust {
		return filepath.Join("/run/kata", sandbox)
	}
	return filepath.Join("/run/vc/sbs", sandbox)
}

// MonitorSocket is the sandbox's management socket.
func (w Way) MonitorSocket(sandbox string) string {
	return filepath.Join(w.StateDir(sandbox), "shim-monitor.sock")
}

// VsockSocket is Cloud Hypervisor's hybrid vsock socket, behind which every
// port of the guest can be reached.
func (w Way) VsockSocket(sandbox string) string {
	if w == Rust {
		return filepath.Join(w.VMDir(sandbox), "ch-vm.sock")
	}
	return filepath.Join(w.VMDir(sandbox), "clh.sock")
}

// APISocket is the VMM's API socket.
func (w Way) APISocket(sandbox string) string {
	if w == Rust {
		return filepath.Join(w.VMDir(sandbox), "ch-api.sock")
	}
	return filepath.Join(w.VMDir(sandbox), "clh-api.sock")
}

// VirtiofsSocket is virtiofsd's socket.
func (w Way) VirtiofsSocket(sandbox string) string {
	return filepath.Join(w.VMDir(sandbox), "virtiofsd.sock")
}

// ShareDir is the directory of the sandbox's share. It is the same in both
// ways; its content differs.
func ShareDir(sandbox string) string {
	return filepath.Join("/run/kata-containers/shared/sandboxes", sandbox)
}
