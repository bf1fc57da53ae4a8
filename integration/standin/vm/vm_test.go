// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/config"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/network"
)

func TestDialSpeaksTheHybridProtocol(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vsock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	asked := make(chan string, 2)
	go func() {
		for _, answer := range []string{"OK 1073741824\nhello", "no\n"} {
			c, err := l.Accept()
			if err != nil {
				return
			}
			line, _ := bufio.NewReader(c).ReadString('\n')
			asked <- line
			_, _ = io.WriteString(c, answer)
			c.Close()
		}
	}()
	c, err := dial(t.Context(), path, 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if line := <-asked; line != "CONNECT 1024\n" {
		t.Errorf("asked %q", line)
	}
	if _, err := dial(t.Context(), path, 1024); err == nil {
		t.Error("a refusal was taken for a connection")
	}
}

func TestTheVMMAnswersWithoutAReason(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for _, answer := range []string{"HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n", "HTTP/1.1 500 \r\nContent-Length: 7\r\n\r\n[\"why\"]"} {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = io.WriteString(c, answer)
			}
			c.Close()
		}
	}()
	v := newVMM(path)
	if err := v.call(t.Context(), http.MethodPut, "vm.boot", nil); err != nil {
		t.Error(err)
	}
	if err := v.call(t.Context(), http.MethodPut, "vm.boot", nil); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("the reason is lost: %v", err)
	}
}

func TestAVMMThatDiesIsNotWaitedFor(t *testing.T) {
	p, err := start(exec.Command("/bin/true"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := newVMM(filepath.Join(t.TempDir(), "none")).waitFor(ctx, p.gone); err == nil || ctx.Err() != nil {
		t.Errorf("%v, context %v", err, ctx.Err())
	}
}

func TestAVMEndsWithItsVirtiofsd(t *testing.T) {
	vmm, err := start(exec.Command("/bin/sleep", "60"))
	if err != nil {
		t.Fatal(err)
	}
	defer vmm.end(0)
	virtiofsd, err := start(exec.Command("/bin/sleep", "60"))
	if err != nil {
		t.Fatal(err)
	}
	defer virtiofsd.end(0)
	v := &VM{vmm: vmm, virtio: virtiofsd}
	go v.endWithVirtiofsd()
	select {
	case <-v.Gone():
		t.Fatal("the VM has ended before its virtiofsd")
	case <-time.After(50 * time.Millisecond):
	}
	virtiofsd.end(0)
	select {
	case <-v.Gone():
	case <-time.After(20 * time.Second):
		t.Error("the VM runs without its virtiofsd")
	}
}

func TestAGrandchildDoesNotHideItsParentsEnd(t *testing.T) {
	pidfile := filepath.Join(t.TempDir(), "pid")
	p, err := start(exec.Command("/bin/sh", "-c", "sleep 60 & echo $! > "+pidfile))
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.gone:
	case <-time.After(10 * time.Second):
		t.Error("still waiting")
	}
	if raw, err := os.ReadFile(pidfile); err == nil {
		_ = exec.Command("kill", strings.TrimSpace(string(raw))).Run()
	}
}

func TestCommandLine(t *testing.T) {
	got := commandLine(&config.Config{KernelParams: "a=b", DebugConsole: true})
	if want := "panic=1 no_timer_check quiet a=b agent.debug_console agent.debug_console_vport=1026"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestATapTravelsWithItsCard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	reader, tap, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	asked := make(chan string, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		request, rights := make([]byte, 4096), make([]byte, 64)
		n, oobn, _, _, err := c.ReadMsgUnix(request, rights)
		asked <- string(request[:n])
		messages, _ := syscall.ParseSocketControlMessage(rights[:oobn])
		if err == nil && len(messages) == 1 {
			if fds, _ := syscall.ParseUnixRights(&messages[0]); len(fds) == 1 {
				got := os.NewFile(uintptr(fds[0]), "tap")
				_, _ = got.WriteString("hello")
				got.Close()
			}
		}
		_, _ = io.WriteString(c, "HTTP/1.1 204 \r\n\r\n")
	}()
	v := &VM{api: newVMM(path)}
	if err := v.Plug(t.Context(), []network.Card{{MAC: "02:00:00:00:00:01", Tap: tap}}); err != nil {
		t.Fatal(err)
	}
	tap.Close()
	if request := <-asked; !strings.HasPrefix(request, "PUT /api/v1/vm.add-net HTTP/1.1\r\n") || !strings.Contains(request, `"mac":"02:00:00:00:00:01"`) {
		t.Errorf("asked %q", request)
	}
	if got, err := io.ReadAll(reader); string(got) != "hello" {
		t.Errorf("the descriptor that came is not the tap: %q, %v", got, err)
	}
}
