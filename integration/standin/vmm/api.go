// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"
)

// States of a machine, in Cloud Hypervisor's words. The zero value means that
// none was created.
const (
	stateCreated  = "Created"
	stateRunning  = "Running"
	statePaused   = "Paused"
	stateShutdown = "Shutdown"
)

// Server serves the API for one machine.
type Server struct {
	settings Settings
	name     string   // of the machine, in log names and QEMU's arguments: Kata's sandbox id
	logFile  *os.File // the children's stdout and stderr

	mu      sync.Mutex
	state   string
	config  vmConfig
	raw     json.RawMessage // vm.create's body, which vm.info returns
	cards   []tapNIC        // added before the boot
	machine *machine

	quitOnce sync.Once
	quit     chan struct{} // closed by vmm.shutdown and when the machine powers off
}

// NewServer returns a server whose children write to logFile.
func NewServer(s Settings, name string, logFile *os.File) *Server {
	return &Server{settings: s, name: name, logFile: logFile, quit: make(chan struct{})}
}

// Serve serves on l until the context ends, vmm.shutdown is called, or the
// machine powers off, as Cloud Hypervisor does.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-ctx.Done():
		case <-s.quit:
		}
		l.Close()
		cancel()
	}()
	var running sync.WaitGroup
	defer running.Wait()
	defer s.shutdown()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		running.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Now()) }) // an answer in progress is still sent
			defer stop()
			if err := s.converse(ctx, c); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).Warn("api connection failed")
			}
		})
	}
}

// converse serves the requests of one connection.
func (s *Server) converse(ctx context.Context, c *net.UnixConn) error {
	in := &rightsReader{conn: c}
	defer in.close()
	reader := bufio.NewReader(in)
	for {
		request, err := http.ReadRequest(reader)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		body, err := io.ReadAll(request.Body)
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		call := strings.TrimPrefix(request.URL.Path, "/api/v1/")
		start := time.Now()
		code, answer := s.handle(request.Method, call, body, in)
		entry := log.G(ctx).WithFields(log.Fields{"call": call, "code": code, "took": time.Since(start)})
		if call == "vmm.ping" || call == "vm.info" { // polled
			entry.Debug("api")
		} else {
			entry.WithField("body", string(body)).Info("api")
		}
		if err := respond(c, code, answer); err != nil {
			return err
		}
		if call == "vmm.shutdown" {
			s.end()
			return nil
		}
	}
}

// respond writes an answer as Cloud Hypervisor does, without a reason phrase in
// the status line: Kata's Rust client accepts no other.
func respond(w io.Writer, code int, answer any) error {
	text := fmt.Sprintf("HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n", code)
	if answer == nil {
		text += "\r\n"
	} else {
		body, err := json.Marshal(answer)
		if err != nil {
			return fmt.Errorf("answer: %w", err)
		}
		text += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	if _, err := io.WriteString(w, text); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

// rightsTaker returns the descriptors that came with the request.
type rightsTaker interface{ take() []*os.File }

// handle implements the API. Its answers are those of Cloud Hypervisor's
// OpenAPI description; an error is a list of sentences.
func (s *Server) handle(method, call string, body []byte, rights rightsTaker) (int, any) {
	want := http.MethodPut
	if call == "vmm.ping" || call == "vm.info" {
		want = http.MethodGet
	}
	if method != want {
		return http.StatusMethodNotAllowed, []string{call + " wants " + want}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	switch call {
	case "vmm.ping":
		return http.StatusOK, map[string]any{"build_version": Version, "version": strings.Fields(Version)[1], "pid": os.Getpid(), "features": []string{}}
	case "vm.info":
		if s.state == "" {
			return http.StatusNotFound, []string{"no machine"}
		}
		return http.StatusOK, map[string]any{"config": s.raw, "state": s.state, "memory_actual_size": s.config.Memory.Size}
	case "vm.create":
		err = s.create(body)
	case "vm.add-net":
		return s.addNet(body, rights.take())
	case "vm.boot":
		err = s.boot()
	case "vm.resize":
		// Kata requests a container's CPUs and memory here. The machine keeps
		// what it was booted with; no test needs more.
		err = s.require(stateRunning)
	case "vm.pause":
		err = s.pauseOrResume("stop", stateRunning, statePaused)
	case "vm.resume":
		err = s.pauseOrResume("cont", statePaused, stateRunning)
	case "vm.shutdown":
		s.stopMachine()
		if s.state != "" {
			s.state = stateShutdown
		}
	case "vm.delete", "vmm.shutdown":
		s.stopMachine()
		s.state, s.raw, s.config = "", nil, vmConfig{}
	default:
		return http.StatusNotFound, []string{"unknown call " + call}
	}
	if err != nil {
		return http.StatusInternalServerError, []string{err.Error()}
	}
	return http.StatusNoContent, nil
}

func (s *Server) require(state string) error {
	if s.state != state {
		return fmt.Errorf("machine is %q, not %q", s.state, state)
	}
	return nil
}

func (s *Server) create(body []byte) error {
	if err := s.require(""); err != nil {
		return err
	}
	var c vmConfig
	if err := json.Unmarshal(body, &c); err != nil {
		return fmt.Errorf("parse configuration: %w", err)
	}
	s.config, s.raw, s.state = c, append(json.RawMessage(nil), body...), stateCreated
	return nil
}

func (s *Server) addNet(body []byte, taps []*os.File) (int, any) {
	var c netConfig
	err := json.Unmarshal(body, &c)
	switch {
	case err != nil:
		err = fmt.Errorf("parse network card: %w", err)
	case len(taps) == 0:
		err = errors.New("a network card without tap descriptors")
	case s.state == stateCreated:
		s.cards = append(s.cards, tapNIC{netConfig: c, taps: taps})
		return http.StatusNoContent, nil
	default:
		if err = s.require(stateRunning); err == nil {
			err = s.machine.plug(tapNIC{netConfig: c, taps: taps})
		}
	}
	closeAll(taps)
	if err != nil {
		return http.StatusInternalServerError, []string{err.Error()}
	}
	return http.StatusNoContent, nil
}

func (s *Server) boot() error {
	if err := s.require(stateCreated); err != nil {
		return err
	}
	m, err := boot(s.config, s.settings, s.name, s.cards, s.logFile)
	if err != nil {
		return err
	}
	s.dropCards()
	s.machine, s.state = m, stateRunning
	go func() {
		<-m.qemu.done
		s.mu.Lock()
		asked := s.machine != m
		s.mu.Unlock()
		if !asked {
			log.L.WithError(m.qemu.err).Info("qemu exited")
			s.end()
		}
	}()
	return nil
}

func (s *Server) pauseOrResume(command, from, to string) error {
	if err := s.require(from); err != nil {
		return err
	}
	if err := s.machine.qmp.execute(command, nil); err != nil {
		return err
	}
	s.state = to
	return nil
}

func (s *Server) stopMachine() {
	m := s.machine
	s.machine = nil // tells the waiter that the exit was requested
	m.stop()
	s.dropCards()
}

func (s *Server) dropCards() {
	for _, c := range s.cards {
		closeAll(c.taps)
	}
	s.cards = nil
}

func (s *Server) shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopMachine()
}

func (s *Server) end() { s.quitOnce.Do(func() { close(s.quit) }) }

// rightsReader reads a connection and keeps received descriptors: vm.add-net
// passes taps this way.
type rightsReader struct {
	conn  *net.UnixConn
	files []*os.File
}

func (r *rightsReader) Read(p []byte) (int, error) {
	oob := make([]byte, 1024)
	n, oobn, _, _, err := r.conn.ReadMsgUnix(p, oob)
	if oobn > 0 {
		messages, parseErr := syscall.ParseSocketControlMessage(oob[:oobn])
		err = errors.Join(err, parseErr)
		for i := range messages {
			fds, parseErr := syscall.ParseUnixRights(&messages[i])
			err = errors.Join(err, parseErr)
			for _, fd := range fds {
				r.files = append(r.files, os.NewFile(uintptr(fd), "tap"))
			}
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (r *rightsReader) take() []*os.File {
	files := r.files
	r.files = nil
	return files
}

func (r *rightsReader) close() { closeAll(r.take()) }

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
