// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// managementTimeout bounds a request to the management socket.
const managementTimeout = 5 * time.Second

// managementInterval is the interval at which the socket is polled for.
const managementInterval = 10 * time.Millisecond

// Management is the HTTP socket of Kata's shim that every sandbox has once it
// is created. The zero value is not usable; see [DefaultManagement].
type Management struct {
	// GoDir and RustDir are where the shims have a directory per sandbox
	// (src/runtime/pkg/containerd-shim-v2/shim_management.go and
	// src/libs/shim-interface/src/lib.rs). Go's takes precedence, as in Kata's own
	// clients.
	GoDir, RustDir string
}

// DefaultManagement has Kata's own paths.
var DefaultManagement = Management{GoDir: "/run/vc/sbs", RustDir: "/run/kata"}

// Guest is the address of a guest.
type Guest struct {
	// hybrid is the VMM's socket for hybrid vsock; "": it has vsock.
	hybrid string
	cid    uint32
	// HooksHideGuestHook: this Kata runs no guest hook for a container whose spec
	// has hooks, because the Rust shim passes an empty hooks object to kata-agent
	// (src/runtime-rs/crates/runtimes/virt_container/src/container_manager/container.rs).
	// It only decides how soon the shim tries a bootstrap container.
	HooksHideGuestHook bool
}

// Guest asks Kata's shim for the address of a sandbox's guest. It waits for the
// socket, which Kata's Go shim creates while it answers Create
// (src/runtime/pkg/containerd-shim-v2/create.go).
func (m Management) Guest(ctx context.Context, sandbox string) (*Guest, error) {
	ctx, cancel := context.WithTimeout(ctx, managementTimeout)
	defer cancel()
	for {
		g, err := m.guest(ctx, sandbox)
		if err == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			return g, err
		}
		select {
		case <-time.After(managementInterval):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func (m Management) guest(ctx context.Context, sandbox string) (*Guest, error) {
	const name = "shim-monitor.sock"
	socket, rust := filepath.Join(m.GoDir, sandbox, name), false
	if _, err := os.Stat(socket); errors.Is(err, fs.ErrNotExist) {
		socket, rust = filepath.Join(m.RustDir, sandbox, name), true
	}
	url, err := get(ctx, socket, "/agent-url")
	if err != nil {
		return nil, fmt.Errorf("ask Kata's shim for its guest's address: %w", err)
	}
	g, err := parseAgentURL(url)
	if err != nil {
		return nil, err
	}
	g.HooksHideGuestHook = rust
	return g, nil
}

func get(ctx context.Context, socket, path string) (string, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shim"+path, http.NoBody)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s: %s", path, resp.Status, abbreviate(string(body)))
	}
	return strings.TrimSpace(string(body)), nil
}

// parseAgentURL parses hvsock://PATH:PORT and vsock://CID:PORT. The port, that
// of kata-agent, is ignored.
func parseAgentURL(url string) (*Guest, error) {
	scheme, rest, _ := strings.Cut(url, "://")
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return nil, fmt.Errorf("guest address %q of Kata's shim has no port", abbreviate(url))
	}
	host := rest[:i]
	switch scheme {
	case "hvsock":
		if !filepath.IsAbs(host) {
			return nil, fmt.Errorf("guest address %q of Kata's shim has no path", abbreviate(url))
		}
		return &Guest{hybrid: host}, nil
	case "vsock":
		cid, err := strconv.ParseUint(host, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("guest address %q of Kata's shim has no context id: %w", abbreviate(url), err)
		}
		return &Guest{cid: uint32(cid)}, nil
	}
	return nil, fmt.Errorf("guest address %q of Kata's shim is not supported: the VM must have vsock", abbreviate(url))
}

// Dial connects to a vsock port of the guest.
func (g *Guest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if g.hybrid == "" {
		conn, err := vsock.DialContext(ctx, g.cid, port, nil)
		if err != nil {
			return nil, err
		}
		return conn, nil
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", g.hybrid)
	if err != nil {
		return nil, err
	}
	if err := hybridConnect(ctx, conn, port); err != nil {
		return nil, errclass.Join(fmt.Errorf("port %d by %s: %w", port, g.hybrid, err), conn.Close())
	}
	return conn, nil
}

// hybridConnect asks a VMM's socket for a port. It reads the answer byte by
// byte: what follows the line belongs to the caller.
func hybridConnect(ctx context.Context, conn net.Conn, port uint32) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return err
	}
	var line []byte
	for b := make([]byte, 1); len(line) < 64; {
		if _, err := io.ReadFull(conn, b); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("nothing in the guest listens: %w", err)
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	if !strings.HasPrefix(string(line), "OK") {
		return fmt.Errorf("the VMM answers %q", line)
	}
	if !stop() {
		return ctx.Err() // the connection's deadline has been set
	}
	return nil
}
