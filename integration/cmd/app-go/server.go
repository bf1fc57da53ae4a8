// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// server appends entries to a file, and answers with the digest of all that
// there are.
type server struct {
	mu    sync.Mutex
	log   *os.File
	chain chain

	// signals has what the next request for a signal is answered with.
	signals chan string
}

// serve runs the server and a client until SIGTERM, and checks the file then.
func serve(ctx context.Context) error {
	ctx, cancel := signal.NotifyContext(ctx, unix.SIGTERM)
	defer cancel()
	log, err := os.Create(logPath)
	if err != nil {
		return err
	}
	s := &server{log: log, signals: make(chan string)}
	certificate, err := makeCertificate()
	if err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/append", s.append)
	mux.HandleFunc("/ticks", ticks)
	mux.HandleFunc("/wait", s.wait)
	mux.HandleFunc("/signal", s.signal)
	h := &http.Server{
		Handler:           mux,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS13},
		ReadHeaderTimeout: time.Minute,
	}
	served := make(chan error, 1)
	go func() { served <- h.ServeTLS(listener, "", "") }()

	client := exec.CommandContext(ctx, "/proc/self/exe", "client")
	client.Stdout = os.Stdout
	client.Cancel = func() error { return client.Process.Signal(unix.SIGTERM) }
	if err := client.Run(); ctx.Err() == nil || !errors.Is(err, ctx.Err()) { // not stopped, or not as it should
		return fmt.Errorf("the client has ended: %w", err)
	}
	if err := h.Shutdown(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	if err := s.check(); err != nil {
		return err
	}
	fmt.Println("stopped")
	return nil
}

// makeCertificate makes a certificate for the server, which its clients find in
// a file.
func makeCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotAfter:              time.Now().AddDate(1, 0, 0),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	err = os.WriteFile(certificatePath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

func (s *server) append(w http.ResponseWriter, r *http.Request) {
	entry, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err = fmt.Fprintf(s.log, "%s\n", entry); err == nil {
		err = s.log.Sync()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.chain.add(string(entry))
	fmt.Fprint(w, &s.chain)
}

// ticks answers with a number every 50 ms, until the client has enough of it.
func ticks(w http.ResponseWriter, r *http.Request) {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for n := 1; ; n++ {
		select {
		case <-r.Context().Done():
			return
		case <-ticker.C:
		}
		fmt.Fprintln(w, n)
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
	}
}

// wait answers once there is a signal.
func (s *server) wait(w http.ResponseWriter, r *http.Request) {
	select {
	case <-r.Context().Done():
	case text := <-s.signals:
		fmt.Fprint(w, text)
	}
}

func (s *server) signal(w http.ResponseWriter, r *http.Request) {
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	select {
	case <-r.Context().Done():
	case s.signals <- string(text):
		fmt.Fprint(w, "sent")
	}
}

// check reads all entries back.
func (s *server) check() error {
	if err := s.log.Close(); err != nil {
		return err
	}
	f, err := os.Open(logPath)
	if err != nil {
		return err
	}
	defer f.Close()
	var have chain
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		have.add(lines.Text())
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if have != s.chain {
		return fmt.Errorf("%s has the entries %s, not %s", logPath, &have, &s.chain)
	}
	return nil
}
