// SPDX-License-Identifier: Apache-2.0

// app-go is the application of the scenario of that name: a server in Go with
// HTTP/2 over TLS, and a client in a process of its own that has requests in
// flight all the time. Both check what they get.
//
// Without arguments it is the server, which starts the client. "signal TEXT"
// answers the client's request for a signal.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

const (
	address = "127.0.0.1:8443"
	// logPath is the file to which the server appends the entries.
	logPath = "/var/lib/app/log"
	// certificatePath is where its clients find its certificate.
	certificatePath = "/tmp/certificate"
)

func main() {
	run := serve
	switch {
	case len(os.Args) == 2 && os.Args[1] == "client":
		run = beClient
	case len(os.Args) == 3 && os.Args[1] == "signal":
		run = sendSignal
	}
	if err := run(context.Background()); err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

// chain is a digest of all entries so far.
type chain struct {
	entries int
	sum     [sha256.Size]byte
}

func (c *chain) add(entry string) {
	c.entries++
	c.sum = sha256.Sum256(append(c.sum[:], entry...))
}

func (c *chain) String() string { return fmt.Sprintf("%d %s", c.entries, hex.EncodeToString(c.sum[:])) }

// newClient returns a client of the server. It checks that the connection is
// alive as soon as it has been idle for a second.
func newClient() (*http.Client, error) {
	certificate, err := os.ReadFile(certificatePath)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(certificate) {
		return nil, fmt.Errorf("%s has no certificate", certificatePath)
	}
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
		ForceAttemptHTTP2: true,
		HTTP2:             &http.HTTP2Config{SendPingTimeout: time.Second, PingTimeout: time.Minute},
	}}, nil
}

// ask sends a request, and returns the answer's body.
func ask(ctx context.Context, client *http.Client, path, body string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK || answer.ProtoMajor != 2 {
		answer.Body.Close()
		return nil, fmt.Errorf("%s: the answer is %s by %s", path, answer.Status, answer.Proto)
	}
	return answer.Body, nil
}

// askText is ask for the whole answer.
func askText(ctx context.Context, client *http.Client, path, body string) (string, error) {
	answer, err := ask(ctx, client, path, body)
	if err != nil {
		return "", err
	}
	defer answer.Close()
	text, err := io.ReadAll(answer)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return string(text), nil
}

func sendSignal(ctx context.Context) error {
	client, err := newClient()
	if err != nil {
		return err
	}
	text, err := askText(ctx, client, "/signal", os.Args[2])
	if err == nil && text != "sent" {
		err = errors.New(text)
	}
	return err
}
