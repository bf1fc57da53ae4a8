// SPDX-License-Identifier: Apache-2.0

// Package hook runs OCI hooks: the engine's on the host, the guest's own in the
// guest. Kata 4.1.0: src/runtime/pkg/katautils/hook.go and
// src/libs/kata-sys-util/src/hooks.rs.
package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Limit is the timeout of a hook without its own, in the guest and, in the Rust
// way, on the host.
const Limit = 10 * time.Second

// Run runs one hook with state on its stdin until it has exited and its output
// is closed: a daemon that it starts has to close its streams. A limit of 0
// means none; the hook's own timeout takes precedence.
func Run(ctx context.Context, h specs.Hook, state any, limit time.Duration) error {
	input, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("hook %s: %w", h.Path, err)
	}
	if h.Timeout != nil && *h.Timeout > 0 {
		limit = time.Duration(*h.Timeout) * time.Second
	}
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	var output bytes.Buffer
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env = append([]string{}, h.Env...) // not nil, which would mean this process's
	cmd.Stdin = bytes.NewReader(input)
	cmd.Stdout, cmd.Stderr = &output, &output
	// A killed hook's child may hold its output open.
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("timed out after %s", limit)
		} else if errors.Is(err, syscall.EPIPE) {
			return nil // a hook need not read its state
		}
		return fmt.Errorf("hook %s: %w: %s", h.Path, err, bytes.TrimSpace(output.Bytes()))
	}
	return nil
}
