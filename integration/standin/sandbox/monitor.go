// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
)

// monitor serves the sandbox's management socket, with one of Kata's requests.
type monitor struct {
	server http.Server
	done   chan struct{}
}

func serveMonitor(socket, agentURL string) (*monitor, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
		return nil, fmt.Errorf("open the management socket: %w", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("open the management socket: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, agentURL) })
	m := &monitor{server: http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}, done: make(chan struct{})}
	go func() {
		defer close(m.done)
		if err := m.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.L.WithError(err).Error("management socket failed")
		}
	}()
	return m, nil
}

func (m *monitor) close() {
	m.server.Close()
	<-m.done
}
