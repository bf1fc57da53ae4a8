// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The test binary is also the fake QEMU and the fake vsock daemon, which their
// arguments tell apart, and a server to be killed.
func TestMain(m *testing.M) {
	switch record := os.Getenv("VMM_TEST_RECORD"); {
	case record == "":
		os.Exit(m.Run())
	case os.Args[1] == serveArgument:
		serve(os.Args[2], record)
	case strings.HasPrefix(os.Args[1], "--guest-cid"):
		fakeVsockDaemon()
	default:
		fakeQEMU(record)
	}
}

const serveArgument = "serve"

func serve(api, record string) {
	l, err := Listen(api)
	if err != nil {
		panic(err)
	}
	s, err := fakeSettings(filepath.Dir(api), record)
	if err != nil {
		panic(err)
	}
	if err := NewServer(s, "box", os.Stderr).Serve(context.Background(), l); err != nil {
		panic(err)
	}
}

func fakeSettings(logs, record string) (Settings, error) {
	return Settings{QEMU: os.Args[0], VhostDeviceVsock: os.Args[0], LogDir: logs, Env: []string{"VMM_TEST_RECORD=" + record}}.withDefaults()
}

// fakeQEMU notes its arguments and the monitor's commands in the file record,
// and shows the ready sign once the file record.ready exists.
func fakeQEMU(record string) {
	out, _ := os.OpenFile(record, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	fmt.Fprintf(out, "pid %d args %q\n", os.Getpid(), os.Args[1:])
	go func() {
		console := os.NewFile(consoleFD, "console")
		fmt.Fprintln(console, "Linux version")
		poll(func() bool {
			_, err := os.Stat(record + ".ready")
			return err == nil
		})
		fmt.Fprintln(console, DefaultReadySign)
	}()
	file := os.NewFile(qmpFD, "qmp")
	conn, _ := net.FileConn(file)
	monitor := &rightsReader{conn: conn.(*net.UnixConn)}
	fmt.Fprintln(conn, `{"QMP": {"version": {}, "capabilities": []}}`)
	lines := bufio.NewScanner(monitor)
	for lines.Scan() {
		fmt.Fprintf(out, "qmp %s with %d files\n", lines.Text(), len(monitor.take()))
		switch {
		case strings.Contains(lines.Text(), "system_powerdown"), strings.Contains(lines.Text(), "02:00:00:00:00:dd"):
			fmt.Fprintln(conn, `{"error": {"class": "GenericError", "desc": "no such luck"}}`)
		default:
			fmt.Fprintln(conn, `{"event": "RESUME"}`+"\n"+`{"return": {}}`)
		}
	}
}

// fakeVsockDaemon answers CONNECT and sends back, after the end of what it
// gets, how much that was.
func fakeVsockDaemon() {
	if err := os.WriteFile(os.Getenv("VMM_TEST_RECORD")+".vsock", []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		panic(err)
	}
	device, _ := net.Listen("unix", "device")
	host, _ := net.Listen("unix", "host")
	go func() {
		if _, err := device.Accept(); err != nil {
			panic(err)
		}
	}()
	for {
		c, err := host.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			r := bufio.NewReader(c)
			line, _ := r.ReadString('\n')
			fmt.Fprint(c, strings.Replace(line, "CONNECT", "OK", 1))
			n, _ := io.Copy(io.Discard, r)
			fmt.Fprintf(c, "%d bytes", n)
		}()
	}
}

type fixture struct {
	t      *testing.T
	api    string
	vsock  string
	record string
	ended  chan error
	stop   context.CancelFunc
}

func start(t *testing.T) *fixture {
	t.Helper()
	dir := t.TempDir()
	f := &fixture{t: t, api: filepath.Join(dir, "api"), vsock: filepath.Join(dir, "vsock"), record: filepath.Join(dir, "record"), ended: make(chan error, 1)}
	logs := filepath.Join(dir, "log")
	if err := os.Mkdir(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	s, err := fakeSettings(logs, f.record)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(f.api)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.stop = cancel
	go func() { f.ended <- NewServer(s, "box", os.Stderr).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		f.waitEnd()
		if left, _ := filepath.Glob(filepath.Join(logs, ".vsock-*")); left != nil {
			t.Errorf("left behind: %v", left)
		}
		for _, path := range []string{f.api, f.vsock} {
			if _, err := os.Lstat(path); err == nil {
				t.Errorf("left behind: %s", path)
			}
		}
		if pid := f.qemuPID(); pid != 0 && syscall.Kill(pid, 0) == nil {
			t.Errorf("qemu %d still runs", pid)
		}
	})
	return f
}

func (f *fixture) waitEnd() {
	f.t.Helper()
	select {
	case err := <-f.ended:
		if err != nil {
			f.t.Errorf("serve: %v", err)
		}
		f.ended <- nil
	case <-time.After(time.Minute):
		f.t.Fatal("the server does not end")
	}
}

func (f *fixture) qemuPID() (pid int) {
	if _, err := fmt.Sscanf(f.recorded(), "pid %d", &pid); err != nil {
		return 0 // not started yet
	}
	return pid
}

func (f *fixture) recorded() string {
	data, _ := os.ReadFile(f.record)
	return string(data)
}

func (f *fixture) waitRecorded(what string) {
	f.t.Helper()
	eventually(f.t, fmt.Sprintf("%q is in %s", what, f.record), func() bool { return strings.Contains(f.recorded(), what) })
}

// call makes one request, with files beside it, and returns the status line's
// rest and the body.
func (f *fixture) call(method, name, body string, files ...*os.File) (status, answer string) {
	f.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: f.api, Net: "unix"})
	if err != nil {
		f.t.Fatal(err)
	}
	defer conn.Close()
	var rights []byte
	for _, file := range files {
		rights = append(rights, syscall.UnixRights(int(file.Fd()))...)
	}
	request := fmt.Sprintf("%s /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", method, name, len(body), body)
	if _, _, err := conn.WriteMsgUnix([]byte(request), rights, nil); err != nil {
		f.t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	status, err = r.ReadString('\n')
	if err != nil {
		f.t.Fatalf("%s: %v", name, err)
	}
	response, err := http.ReadResponse(bufio.NewReader(io.MultiReader(strings.NewReader(status), r)), &http.Request{Method: method})
	if err != nil {
		f.t.Fatalf("%s: %v", name, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		f.t.Fatalf("%s: %v", name, err)
	}
	return strings.TrimSuffix(strings.TrimPrefix(status, "HTTP/1.1 "), "\r\n"), string(text)
}

func (f *fixture) want(status, method, name, body string, files ...*os.File) string {
	f.t.Helper()
	got, answer := f.call(method, name, body, files...)
	if got != status {
		f.t.Fatalf("%s: status %q, want %q: %s", name, got, status, answer)
	}
	return answer
}

func (f *fixture) state() string {
	f.t.Helper()
	var info struct{ State string }
	if err := json.Unmarshal([]byte(f.want("200 ", "GET", "vm.info", "")), &info); err != nil {
		f.t.Fatal(err)
	}
	return info.State
}

func (f *fixture) config() string {
	return fmt.Sprintf(`{"payload":{"kernel":"k"},"vsock":{"cid":3,"socket":%q}}`, f.vsock)
}

func TestLifecycle(t *testing.T) {
	f := start(t)
	if got := f.want("200 ", "GET", "vmm.ping", ""); !strings.Contains(got, `"v50.0"`) {
		t.Errorf("ping: %s", got)
	}
	f.want("404 ", "GET", "vm.info", "")
	f.want("500 ", "PUT", "vm.boot", "")
	f.want("405 ", "GET", "vm.boot", "")
	f.want("404 ", "PUT", "vm.no-such-call", "")
	f.want("500 ", "PUT", "vm.create", "{")
	f.want("204 ", "PUT", "vm.create", f.config())
	f.want("500 ", "PUT", "vm.create", f.config())
	if got := f.state(); got != "Created" {
		t.Errorf("state %s after vm.create", got)
	}
	early, late := tap(t), tap(t)
	f.want("204 ", "PUT", "vm.add-net", `{"mac":"02:00:00:00:00:aa"}`, early)
	f.want("500 ", "PUT", "vm.add-net", `{"mac":"02:00:00:00:00:ab"}`)
	f.want("204 ", "PUT", "vm.boot", "")
	if got := f.state(); got != "Running" {
		t.Errorf("state %s after vm.boot", got)
	}
	f.waitRecorded(`"-netdev" "tap,id=net0,fd=6" "-device" "virtio-net-pci,netdev=net0,romfile=,mac=02:00:00:00:00:aa"`)
	f.want("204 ", "PUT", "vm.add-net", `{"mac":"02:00:00:00:00:bb"}`, late)
	f.waitRecorded(`"getfd","arguments":{"fdname":"tap1.0"}} with 1 files`)
	f.waitRecorded(`"mac":"02:00:00:00:00:bb"`)
	if got := f.want("500 ", "PUT", "vm.add-net", `{"mac":"02:00:00:00:00:dd"}`, late); !strings.Contains(got, "no such luck") {
		t.Errorf("QEMU's error is lost: %s", got)
	}
	f.want("204 ", "PUT", "vm.resize", `{"desired_vcpus":2}`)
	f.want("500 ", "PUT", "vm.resume", "")
	f.want("204 ", "PUT", "vm.pause", "")
	if got := f.state(); got != "Paused" {
		t.Errorf("state %s after vm.pause", got)
	}
	f.want("204 ", "PUT", "vm.resume", "")
	pid := f.qemuPID()
	f.want("204 ", "PUT", "vm.shutdown", "")
	if err := syscall.Kill(pid, 0); err == nil {
		t.Errorf("qemu %d runs after vm.shutdown", pid)
	}
	f.want("204 ", "PUT", "vm.delete", "")
	f.want("404 ", "GET", "vm.info", "")
	f.want("204 ", "PUT", "vmm.shutdown", "")
	f.waitEnd()
}

func tap(t *testing.T) *os.File {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestVsockWaitsForTheGuest(t *testing.T) {
	f := start(t)
	f.want("204 ", "PUT", "vm.create", f.config())
	f.want("204 ", "PUT", "vm.boot", "")
	dial := func() *net.UnixConn {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: f.vsock, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(c, "CONNECT 1024")
		return c
	}
	early := dial()
	defer early.Close()
	if data, err := io.ReadAll(early); len(data) > 0 {
		t.Fatalf("before the guest is ready: %q, %v", data, err)
	}
	if err := os.WriteFile(f.record+".ready", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var answer string
	for deadline := time.Now().Add(time.Minute); answer == "" && time.Now().Before(deadline); {
		c := dial()
		fmt.Fprint(c, strings.Repeat("x", 1<<20))
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		data, _ := io.ReadAll(c) // hung up on while the sign is on its way
		answer = string(data)
		c.Close()
	}
	if want := "OK 1024\n1048576 bytes"; answer != want {
		t.Errorf("through the proxy, half closed: %q, want %q", answer, want)
	}
}

func TestTheServerEndsWithItsMachine(t *testing.T) {
	f := start(t)
	f.want("204 ", "PUT", "vm.create", f.config())
	f.want("204 ", "PUT", "vm.boot", "")
	f.waitRecorded("pid")
	if err := syscall.Kill(f.qemuPID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	f.waitEnd()
}

func TestNothingOutlivesAKilledServer(t *testing.T) {
	dir := t.TempDir()
	f := &fixture{t: t, api: filepath.Join(dir, "api"), vsock: filepath.Join(dir, "vsock"), record: filepath.Join(dir, "record")}
	server := exec.Command(os.Args[0], serveArgument, f.api)
	server.Env = append(os.Environ(), "VMM_TEST_RECORD="+f.record)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Process.Kill() }()
	eventually(t, "the server listens", func() bool {
		c, err := net.Dial("unix", f.api)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	f.want("204 ", "PUT", "vm.create", f.config())
	f.want("204 ", "PUT", "vm.boot", "")
	f.waitRecorded("pid")
	daemon, err := os.ReadFile(f.record + ".vsock")
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = server.Wait() // killed
	for name, pid := range map[string]string{"qemu": strconv.Itoa(f.qemuPID()), "vsock daemon": string(daemon)} {
		eventually(t, name+" ends", func() bool {
			stat, err := os.ReadFile("/proc/" + pid + "/stat")
			return err != nil || strings.Contains(string(stat), ") Z ") // pid 1 may take its time to reap
		})
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	if !poll(is) {
		t.Fatalf("not so in time: %s", what)
	}
}

func poll(is func() bool) bool {
	deadline := time.After(time.Minute)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline:
			return is()
		}
	}
	return true
}

func TestListenReplacesOnlyADeadSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("a socket in use was replaced")
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = Listen(path)
	if err != nil {
		t.Fatalf("a dead socket stays in the way: %v", err)
	}
	l.Close()
}
