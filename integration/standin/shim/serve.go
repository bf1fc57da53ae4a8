// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/publish"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

const (
	// listenerFd is the socket that `start` passes on.
	listenerFd = 3
	// socketEnv has the socket's path, to remove it.
	socketEnv = "STANDIN_SOCKET"
	// logPatience is how long a shim lives without a reader of its log, as the
	// Go shim does.
	logPatience = 2 * time.Second
)

// serve runs the shim.
func serve(w way.Way, f *flags) error {
	unix.CloseOnExec(listenerFd)
	if err := openLog("log"); err != nil {
		return err
	}
	if w == way.Rust {
		ignore := make(chan os.Signal, 1)
		signal.Notify(ignore, unix.SIGTERM)
	}
	socket := os.NewFile(listenerFd, "listener")
	l, err := net.FileListener(socket)
	socket.Close()
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	server, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()),
		ttrpc.WithUnaryServerInterceptor(asKata(w)))
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	events := publish.New(os.Getenv("TTRPC_ADDRESS"), f.namespace)
	ended := make(chan struct{})
	s := newService(w, f.id, f.namespace, events, func() { end(w, events, ended) })
	task.RegisterTTRPCTaskService(server, s)
	err = server.Serve(context.Background(), l)
	if errors.Is(err, ttrpc.ErrServerClosed) {
		<-ended
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}

// answerTime is how long the Rust shim waits for the answer to the last request
// to be sent; the Go shim does not answer it.
const answerTime = 50 * time.Millisecond

// end exits. The Go shim leaves its socket behind.
func end(w way.Way, events *publish.Publisher, ended chan struct{}) {
	defer close(ended)
	if w == way.Rust {
		time.Sleep(answerTime) //nolint:forbidigo // as Kata does
		if path := os.Getenv(socketEnv); path != "" {
			_ = os.Remove(path)
		}
	}
	events.Close()
	os.Exit(0)
}

// openLog redirects stderr, panics included, to the FIFO that containerd reads.
func openLog(path string) error {
	// The exit of containerd must not kill the shim. SIGPIPE is not ignored,
	// because children would inherit that.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, unix.SIGPIPE)
	for deadline := time.Now().Add(logPatience); ; {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			// Blocking from here on: no log line may get lost.
			if err := unix.SetNonblock(fd, false); err != nil {
				return fmt.Errorf("open the log: %w", err)
			}
			if err := unix.Dup2(fd, 2); err != nil {
				return fmt.Errorf("open the log: %w", err)
			}
			log.L.Logger.SetOutput(os.Stderr)
			return unix.Close(fd)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("open the log: %w", err)
		}
		time.Sleep(10 * time.Millisecond) //nolint:forbidigo // the pause between two attempts
	}
}
