// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestTheManagementSocketTellsWhereTheAgentIs(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sbs", "shim-monitor.sock")
	m, err := serveMonitor(socket, "hvsock:///x.sock:1024")
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	answer, err := client.Get("http://shim/agent-url")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if got, _ := io.ReadAll(answer.Body); string(got) != "hvsock:///x.sock:1024" {
		t.Errorf("%q", got)
	}
	m.close()
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestAProcessIsKnownByItsStart(t *testing.T) {
	one, err := startOf(os.Getpid())
	if err != nil || one == "" {
		t.Fatalf("%q %v", one, err)
	}
	if again, _ := startOf(os.Getpid()); again != one {
		t.Errorf("%s and %s", one, again)
	}
}

func TestASandboxTakesNothingFromAnotherOfItsName(t *testing.T) {
	dir := t.TempDir()
	theirs, ours := filepath.Join(dir, "vm", "s"), filepath.Join(dir, "share", "s")
	if err := os.MkdirAll(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := claim(ours, theirs); err == nil {
		t.Error("a folder in use was taken")
	}
	if _, err := os.Stat(theirs); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(ours); !os.IsNotExist(err) {
		t.Errorf("a folder is left behind: %v", err)
	}
	if err := claim(ours, filepath.Join(dir, "other")); err != nil {
		t.Error(err)
	}
}

func TestAnAgentThatDoesNotAnswerIsNoticed(t *testing.T) {
	gone, calls := make(chan struct{}), 0
	if !watch(gone, time.Millisecond, 10*time.Millisecond, func(ctx context.Context) {
		if calls++; calls > 3 {
			<-ctx.Done()
		}
	}) {
		t.Error("an agent that does not answer is well")
	}
	if calls != 4 {
		t.Errorf("it was asked %d times, and 3 times it has answered", calls)
	}
	close(gone)
	if watch(gone, time.Hour, time.Hour, func(context.Context) {}) {
		t.Error("a VM that has gone is to be ended")
	}
}
