// Package way names the two ways in which Kata is built, the Go shim's and the
// Rust shim's, and what differs between them in file names alone. Everything
// here is pure: the rest of the stand-in asks it and does.
package way

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Way is which of Kata's shims is stood in for.
type Way string

const (
	// Go is Kata's src/runtime.
	Go Way = "go"
	// Rust is Kata's src/runtime-rs, the default since Kata 4.0.
	Rust Way = "rust"
)

// Env overrides the way where nothing else tells it.
const Env = "STANDIN_WAY"

// Parse takes a way by its name.
func Parse(name string) (Way, error) {
	switch w := Way(name); w {
	case Go, Rust:
		return w, nil
	}
	return "", fmt.Errorf("unknown way %q, want go or rust", name)
}

// OfBinary tells the way before any configuration is known: `start` names its
// socket by it. The environment comes first, then the name of the folder that
// the binary lies in.
func OfBinary(executable string) (Way, error) {
	if name := os.Getenv(Env); name != "" {
		return Parse(name)
	}
	w, err := Parse(filepath.Base(filepath.Dir(executable)))
	if err != nil {
		return "", fmt.Errorf("%s lies in no folder named go or rust, and %s is not set", executable, Env)
	}
	return w, nil
}

// socketRoot is where both of Kata's shims listen, whatever containerd's own
// state folder is.
const socketRoot = "/run/containerd/s"

// Address is the shim's address: a digest of the -address flag, the namespace
// and the sandbox, in lower-case hex in Go and in upper-case in Rust.
func (w Way) Address(containerd, namespace, sandbox string) string {
	sum := sha256.Sum256([]byte(filepath.Join(containerd, namespace, sandbox)))
	name := fmt.Sprintf("%x", sum)
	if w == Rust {
		name = strings.ToUpper(name)
	}
	return "unix://" + filepath.Join(socketRoot, name)
}

// VMDir holds the VM's sockets.
func (w Way) VMDir(sandbox string) string {
	if w == Rust {
		return filepath.Join("/run/kata", sandbox)
	}
	return filepath.Join("/run/vc/vm", sandbox)
}

// StateDir holds the sandbox's management socket.
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

// APISocket is the VMM's own.
func (w Way) APISocket(sandbox string) string {
	if w == Rust {
		return filepath.Join(w.VMDir(sandbox), "ch-api.sock")
	}
	return filepath.Join(w.VMDir(sandbox), "clh-api.sock")
}

// VirtiofsSocket is what the VMM reaches virtiofsd by.
func (w Way) VirtiofsSocket(sandbox string) string {
	return filepath.Join(w.VMDir(sandbox), "virtiofsd.sock")
}

// ShareDir holds the folders of the sandbox's share. It is the same in both
// ways; what is below differs.
func ShareDir(sandbox string) string {
	return filepath.Join("/run/kata-containers/shared/sandboxes", sandbox)
}
