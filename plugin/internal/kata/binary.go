// SPDX-License-Identifier: Apache-2.0

// Package kata is all that the shim knows about Kata's own shim, its
// downstream: how its binary is called and answers, how to find and dial the
// guest, and what it leaves behind. Kata's Go and Rust shims differ in each of
// these. The package handles both without knowing which one it has.
//
// Written against Kata Containers 4.1.0, to whose sources the comments refer.
package kata

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// addressSuffix distinguishes the -address of Kata's shim from ours: both hash
// it into the name of their socket, and Kata's removes a socket that exists
// (src/runtime/pkg/containerd-shim-v2/service.go, StartShim).
const addressSuffix = ".kata-checkpoint"

// maxOutput bounds what is read of a binary's output, in bytes.
const maxOutput = 1 << 20

// Binary is Kata's shim.
type Binary struct{ Path string }

// Find looks up the binary that the configuration's downstream_shim names.
func Find(name string) (Binary, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return Binary{}, errcode.NoKataShim.Errorf("no shim of Kata at %q: set downstream_shim in config.toml to its path: %w", name, err)
	}
	return Binary{Path: path}, nil
}

// Args turns the arguments that containerd gave us into those for Kata.
func Args(args []string) []string {
	out := make([]string, len(args))
	copy(out, args)
	for i, a := range out {
		flag := strings.TrimLeft(a, "-")
		switch {
		case flag == a:
		case flag == "address" && i+1 < len(out):
			out[i+1] += addressSuffix
			return out
		case strings.HasPrefix(flag, "address="):
			out[i] += addressSuffix
			return out
		}
	}
	return out
}

// Call is one run of the binary.
type Call struct {
	// Args are containerd's, see [Args].
	Args  []string
	Stdin io.Reader
	// Env is added to the environment.
	Env []string
}

// Run runs the binary in the current directory until it exits, and returns its
// stdout. Errors include its stderr.
func (b Binary) Run(ctx context.Context, c Call) ([]byte, error) {
	// Files, not pipes: a daemon that the binary leaves behind may keep them open.
	stdout, err := memfd("stdout")
	if err != nil {
		return nil, err
	}
	defer stdout.Close()
	stderr, err := memfd("stderr")
	if err != nil {
		return nil, err
	}
	defer stderr.Close()

	cmd := exec.CommandContext(ctx, b.Path, Args(c.Args)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, stdout, stderr
	cmd.Env = append(os.Environ(), c.Env...)
	// containerd kills a delete that takes too long. Kata's must not continue
	// beside the next container of the same name. The signal is sent when the
	// thread that started the process exits, so it must not.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	runErr := cmd.Run()
	runtime.UnlockOSThread()
	out, err := content(stdout)
	if err != nil {
		return nil, err
	}
	said, err := content(stderr)
	if err != nil {
		return nil, err
	}
	if runErr == nil && len(out) == 0 && len(said) > 0 {
		// Kata's Rust shim prints its errors and exits with 0
		// (src/runtime-rs/crates/shim/src/bin/main.rs).
		runErr = errors.New("no answer")
	}
	if runErr != nil {
		return out, fmt.Errorf("%s: %w%s", filepath.Base(b.Path), runErr, quote(said))
	}
	return out, nil
}

// quote formats the tail of a program's output for the end of an error.
func quote(said []byte) string {
	const limit = 2000
	said = bytes.TrimSpace(said)
	if len(said) == 0 {
		return ""
	}
	if len(said) > limit {
		said = append([]byte("…"), said[len(said)-limit:]...)
	}
	return ": " + strings.ToValidUTF8(string(said), "?")
}

func memfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func content(f *os.File) ([]byte, error) {
	data, err := io.ReadAll(io.NewSectionReader(f, 0, maxOutput))
	if err != nil {
		return nil, fmt.Errorf("read %s of Kata's shim: %w", f.Name(), err)
	}
	return data, nil
}

// Endpoint is where Kata's shim serves.
type Endpoint struct {
	// Address is unix://PATH.
	Address string `json:"address"`
	// Version is that of the task API, 2 or 3.
	Version int `json:"version"`
}

// Path is the socket's path.
func (e Endpoint) Path() string { return strings.TrimPrefix(e.Address, "unix://") }

// Service is the name of its task service.
func (e Endpoint) Service() string { return fmt.Sprintf("containerd.task.v%d.Task", e.Version) }

// ParseStart parses the answer to `start`: a bare address, as Kata's shims
// print it, or containerd's JSON.
func ParseStart(out []byte) (Endpoint, error) {
	text := strings.TrimSpace(string(out))
	e := Endpoint{Address: text, Version: 2}
	if strings.HasPrefix(text, "{") {
		var answer struct {
			Endpoint
			Protocol string `json:"protocol"`
		}
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			return e, errcode.KataAnswer.Errorf("answer of Kata's shim to start: %q: %w", abbreviate(text), err)
		}
		if answer.Protocol != "" && answer.Protocol != "ttrpc" {
			return e, errcode.KataAnswer.Errorf("answer of Kata's shim to start: protocol %q is not supported, only ttrpc", answer.Protocol)
		}
		if e = answer.Endpoint; e.Version == 0 {
			e.Version = 2
		}
	}
	switch {
	case text == "":
		return e, errcode.KataAnswer.Wrap(errors.New("no answer of Kata's shim to start"))
	case e.Version != 2 && e.Version != 3:
		return e, errcode.KataAnswer.Errorf("answer of Kata's shim to start: unknown version %d of the task API", e.Version)
	case !strings.HasPrefix(e.Address, "unix:///") || strings.ContainsFunc(e.Address, func(r rune) bool { return r <= ' ' || r > '~' }):
		return e, errcode.KataAnswer.Errorf("answer of Kata's shim to start: %q is not the address of a socket: is downstream_shim in config.toml Kata's shim?", abbreviate(text))
	}
	return e, nil
}

func abbreviate(s string) string {
	const limit = 200
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
