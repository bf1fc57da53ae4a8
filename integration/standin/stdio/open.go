// SPDX-License-Identifier: Apache-2.0

// Package stdio copies between the streams of a process in the guest and the
// ends that the engine names: FIFOs, a file, or a logger that it starts. Kata
// 4.1.0: src/runtime/pkg/containerd-shim-v2/{stream,shim_io_*}.go and
// src/runtime-rs/crates/runtimes/virt_container/src/container_manager/process.rs.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/fifo"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Paths are the engine's names for a process's streams; an empty one is unused.
type Paths struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// None reports whether the engine uses no stream.
func (p Paths) None() bool { return p.Stdin == "" && p.Stdout == "" && p.Stderr == "" }

// ends are the opened streams.
type ends struct {
	in       io.ReadCloser
	out, err io.WriteCloser
	// after is called at the end of the output.
	after func()
}

func open(ctx context.Context, w way.Way, namespace, id string, p Paths) (*ends, error) {
	uri, err := url.Parse(p.Stdout)
	if err != nil {
		return nil, fmt.Errorf("open stdio: %w", err)
	}
	switch uri.Scheme {
	case "", "fifo":
		return openFifos(ctx, w, p)
	case "file":
		return openFile(uri.Path, p.Terminal)
	case "binary":
		return startLogger(namespace, id, uri)
	}
	return nil, fmt.Errorf("open stdio: unknown scheme %q", uri.Scheme)
}

// openFifos opens the output also for reading, so that nothing fails or blocks
// if the engine's reader is late or gone.
func openFifos(ctx context.Context, w way.Way, p Paths) (_ *ends, err error) {
	e := &ends{}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if p.Stdin != "" {
		if e.in, err = openStdin(ctx, w, p.Stdin); err != nil {
			return nil, fmt.Errorf("open stdin: %w", err)
		}
	}
	if p.Stdout != "" {
		if e.out, err = fifo.OpenFifo(ctx, p.Stdout, syscall.O_RDWR, 0); err != nil {
			return nil, fmt.Errorf("open stdout: %w", err)
		}
	}
	if p.Stderr != "" && !p.Terminal {
		if e.err, err = fifo.OpenFifo(ctx, p.Stderr, syscall.O_RDWR, 0); err != nil {
			return nil, fmt.Errorf("open stderr: %w", err)
		}
	}
	return e, nil
}

// openStdin opens stdin: the Rust way has its own writer by now, the Go way
// waits for the engine's in the background.
func openStdin(ctx context.Context, w way.Way, path string) (io.ReadCloser, error) {
	if w == way.Go {
		return fifo.OpenFifo(ctx, path, syscall.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func openFile(path string, terminal bool) (*ends, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("open the log file: %w", err)
	}
	open := func() (*os.File, error) {
		return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	}
	out, err := open()
	if err != nil {
		return nil, fmt.Errorf("open the log file: %w", err)
	}
	if terminal {
		return &ends{out: out}, nil
	}
	stderr, err := open()
	if err != nil {
		out.Close()
		return nil, fmt.Errorf("open the log file: %w", err)
	}
	return &ends{out: out, err: stderr}, nil
}

// loggerPatience is how long a logger may take to write its remaining input.
const loggerPatience = 12 * time.Second

// startLogger starts the engine's logger with the output's read ends as
// descriptors 3 and 4, and waits until the logger closes 5 to report that it is
// ready.
func startLogger(namespace, id string, uri *url.URL) (_ *ends, err error) {
	var args []string
	for key, values := range uri.Query() {
		args = append(args, key)
		if len(values) > 0 {
			args = append(args, values[0])
		}
	}
	cmd := exec.Command(uri.Path, args...)
	cmd.Env = append(os.Environ(), "CONTAINER_ID="+id, "CONTAINER_NAMESPACE="+namespace)

	var opened []*os.File
	defer func() {
		if err != nil {
			for _, f := range opened {
				f.Close()
			}
		}
	}()
	pipe := func() (r, w *os.File) {
		var perr error
		if r, w, perr = os.Pipe(); perr != nil {
			err = errors.Join(err, perr)
			return
		}
		opened = append(opened, r, w)
		return
	}
	outR, outW := pipe()
	errR, errW := pipe()
	readyR, readyW := pipe()
	if err != nil {
		return nil, fmt.Errorf("start the logger: %w", err)
	}
	cmd.ExtraFiles = []*os.File{outR, errR, readyW}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the logger: %w", err)
	}
	outR.Close()
	errR.Close()
	readyW.Close()
	_, rerr := readyR.Read(make([]byte, 1))
	readyR.Close()
	if rerr != nil && rerr != io.EOF {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("wait for the logger: %w", rerr)
	}
	return &ends{out: outW, err: errW, after: func() { endLogger(cmd) }}, nil
}

func endLogger(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(syscall.SIGTERM)
	patience := time.AfterFunc(loggerPatience, func() { _ = cmd.Process.Kill() })
	defer patience.Stop()
	_ = cmd.Wait()
}

func (e *ends) close() {
	for _, c := range []io.Closer{e.in, e.out, e.err} {
		if c != nil {
			c.Close()
		}
	}
	if e.after != nil {
		e.after()
	}
}
