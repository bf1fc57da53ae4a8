// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// client serves an agent and connects to it.
func client(t *testing.T, a *Agent) api.AgentService {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.guard))
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterAgentService(server, a)
	go func() { _ = server.Serve(context.Background(), l) }()
	t.Cleanup(func() { _ = server.Close() })
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { _ = c.Close() })
	return api.NewAgentClient(c)
}

// A process may call itself what it likes, and a refusal that names it reaches the
// shim: encoding an error that is no UTF-8 would end the connection, with the
// leases and execs of all containers on it.
func TestARefusalNamesAnyProcess(t *testing.T) {
	init := exec.Command("sh", "-c", `exec 5<&0; unshare --uts sh -c "$0" & echo $!; wait`, `printf 'a\377\033]0;x' >/proc/$$/comm; echo ready; read line <&5`)
	out := testproc.Start(t, init)
	odd := 0
	for ready := false; !ready || odd == 0; { // in either order
		line, err := out.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		ready = ready || line == "ready\n"
		if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			odd = pid
		}
	}
	a, c := adopted(t, init.Process.Pid, odd)
	conn := client(t, a)
	for range 2 {
		_, err := conn.CheckCheckpoint(t.Context(), &api.CheckpointRequest{ContainerId: c.ID})
		err = errgrpc.ToNative(err)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the process a??]0;x (pid ") {
			t.Errorf("refused with: %v", err)
		}
	}
}
