// SPDX-License-Identifier: Apache-2.0

// Package manager implements the invocations of the shim's binary other than
// the daemon: start, delete and -info. Each runs Kata's own binary with the
// same arguments and adds our part: a daemon in front of Kata's. containerd
// calls start; the daemon (package plugin/internal/daemon) serves until
// Shutdown; then comes delete, which has to cope with whatever is still
// running.
//
// Written against containerd 2.4 and Kata Containers 4.1.0.
package manager

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Name of the runtime, as containerd's configuration and engines have it.
const Name = "io.containerd.kata-checkpoint.v2"

// SocketDir is where containerd and all shims have their sockets.
const SocketDir = "/run/containerd/s"

// ErrUsage is returned for a command line that is not containerd's.
var ErrUsage = errcode.Usage.Wrap(errors.New("this program is started by containerd"))

// Invocation is a command line of containerd's.
type Invocation struct {
	// Args are all arguments, for Kata's binary.
	Args []string

	Action    string
	Info      bool
	Version   bool
	Debug     bool
	Namespace string
	ID        string
	// Address is containerd's gRPC socket.
	Address string
	// Bundle is the bundle's directory.
	Bundle string

	Stdin io.Reader
	// SocketDir is where our sockets are.
	SocketDir string
}

// Parse parses a command line. Flags are containerd's (pkg/shim/shim.go).
func Parse(args []string) (*Invocation, error) {
	i := &Invocation{Args: args, Stdin: os.Stdin, SocketDir: SocketDir}
	f := flag.NewFlagSet("containerd-shim-kata-checkpoint-v2", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.BoolVar(&i.Debug, "debug", false, "")
	f.BoolVar(&i.Version, "v", false, "")
	f.BoolVar(&i.Version, "version", false, "")
	f.BoolVar(&i.Info, "info", false, "")
	f.StringVar(&i.Namespace, "namespace", "", "")
	f.StringVar(&i.ID, "id", "", "")
	f.StringVar(&i.Bundle, "bundle", "", "")
	f.StringVar(&i.Address, "address", "", "")
	for _, unused := range []string{"socket", "debug-socket", "publish-binary"} {
		f.String(unused, "", "")
	}
	if err := f.Parse(args); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUsage, err)
	}
	i.Action = f.Arg(0)
	if i.Info || i.Version {
		return i, nil
	}
	if i.Namespace == "" || i.ID == "" {
		return nil, fmt.Errorf("%w, with -namespace and -id", ErrUsage)
	}
	for _, name := range []string{i.Namespace, i.ID} {
		// They become elements of paths.
		if strings.ContainsRune(name, '/') || name == "." || name == ".." {
			return nil, fmt.Errorf("%w: %q is not a valid identifier", ErrUsage, name)
		}
	}
	if i.Bundle == "" {
		dir, err := os.Getwd()
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		i.Bundle = dir
	}
	return i, nil
}

// socketPath is where the daemon of a sandbox serves. Its hash differs from
// those of containerd's and Kata's shims, with which it would collide.
func (i *Invocation) socketPath(sandbox string) string {
	sum := sha256.Sum256([]byte(filepath.Join("kata-checkpoint", i.Address, i.Namespace, sandbox)))
	return filepath.Join(i.SocketDir, fmt.Sprintf("%x", sum))
}
