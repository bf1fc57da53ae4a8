// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// vsockDaemon is a running vhost-device-vsock. Its sockets have no paths any
// more: [startVsock] opens descriptors of them and removes their directory, so
// that nothing is left behind however this process exits.
type vsockDaemon struct {
	*child
	device *os.File // connection for QEMU's vhost-user-vsock device
	host   *os.File // O_PATH descriptor of the socket with the CONNECT/OK protocol
}

const daemonStartTimeout = time.Minute

// startVsock starts the daemon for one guest. Its sockets have short relative
// paths in a temporary working directory: the kernel limits socket paths to 107
// bytes, and log directories may be deep.
func startVsock(s Settings, cid uint32, logFile *os.File) (_ *vsockDaemon, err error) {
	dir, err := os.MkdirTemp(s.LogDir, ".vsock-")
	if err != nil {
		return nil, fmt.Errorf("start vsock daemon: %w", err)
	}
	defer os.RemoveAll(dir)
	handle, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("start vsock daemon: %w", err)
	}
	defer handle.Close()

	cmd := exec.Command(s.VhostDeviceVsock, fmt.Sprintf("--guest-cid=%d", cid), "--socket=device", "--uds-path=host")
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, logFile, logFile
	d := &vsockDaemon{}
	if d.child, err = startChild(cmd, s.Env); err != nil {
		return nil, fmt.Errorf("start vsock daemon: %w", err)
	}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	// The daemon does not report when its sockets listen.
	deadline := time.Now().Add(daemonStartTimeout)
	for {
		if d.device, err = dialFile(descriptorPath(handle, "device")); err == nil {
			break
		}
		select {
		case <-d.done:
			return nil, fmt.Errorf("vsock daemon exited: %w", errors.Join(d.err, err))
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("vsock daemon does not listen: %w", err)
		}
	}
	fd, err := unix.Open(filepath.Join(dir, "host"), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("vsock daemon's host socket: %w", err)
	}
	d.host = os.NewFile(uintptr(fd), "vsock")
	return d, nil
}

func descriptorPath(f *os.File, elem ...string) string {
	return filepath.Join(append([]string{fmt.Sprintf("/proc/self/fd/%d", f.Fd())}, elem...)...)
}

func dialFile(path string) (*os.File, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.File()
}

func (d *vsockDaemon) dial() (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: descriptorPath(d.host), Net: "unix"})
}

func (d *vsockDaemon) close() {
	if d == nil {
		return
	}
	d.kill()
	if d.device != nil {
		d.device.Close()
	}
	if d.host != nil {
		d.host.Close()
	}
}

// holdBack is how long a connection waits for the guest to become ready before
// the proxy closes it. Kata dials in a tight loop, and its next attempt follows
// immediately.
const holdBack = 200 * time.Millisecond

// proxy listens on the hybrid vsock socket that Kata named, in front of the
// daemon.
//
// The daemon's worker thread exits silently if a connection arrives before the
// guest's driver has set up its queues, and Kata dials from the moment the VM
// runs. So nothing is forwarded to the daemon before the guest is ready.
type proxy struct {
	listener *net.UnixListener
	dial     func() (*net.UnixConn, error)
	ready    <-chan struct{}
	running  sync.WaitGroup
	cancel   context.CancelFunc
}

func startProxy(socket string, ready <-chan struct{}, dial func() (*net.UnixConn, error)) (*proxy, error) {
	l, err := Listen(socket)
	if err != nil {
		return nil, fmt.Errorf("hybrid vsock socket: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &proxy{listener: l, dial: dial, ready: ready, cancel: cancel}
	p.running.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return // closed
			}
			p.running.Go(func() { p.serve(ctx, c) })
		}
	})
	return p, nil
}

// close removes the socket, closes all connections and waits for them.
func (p *proxy) close() {
	if p == nil {
		return
	}
	p.cancel()
	p.listener.Close()
	p.running.Wait()
}

func (p *proxy) serve(ctx context.Context, client *net.UnixConn) {
	defer client.Close()
	select {
	case <-p.ready:
	case <-time.After(holdBack):
		return
	case <-ctx.Done():
		return
	}
	guest, err := p.dial()
	if err != nil {
		return
	}
	defer guest.Close()
	stop := context.AfterFunc(ctx, func() {
		client.Close()
		guest.Close()
	})
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { forward(guest, client) })
	both.Go(func() { forward(client, guest) })
	both.Wait()
}

// forward copies one direction and forwards EOF, so that a half-closed
// connection stays half-closed. If the receiver is gone, the sender's
// connection is shut down for reading, instead of filling its buffers.
func forward(to, from *net.UnixConn) {
	_, err := io.Copy(to, from)
	_ = to.CloseWrite()
	if err != nil {
		_ = from.CloseRead()
	}
}

// Listen creates a listening socket at path. The stale socket of a killed
// process is replaced, a live one is not.
func Listen(path string) (*net.UnixListener, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if !errors.Is(err, syscall.EADDRINUSE) {
		return l, err
	}
	if c, dialErr := net.DialUnix("unix", nil, addr); dialErr == nil {
		c.Close()
		return nil, err
	}
	if err := os.Remove(path); err != nil {
		return nil, err
	}
	return net.ListenUnix("unix", addr)
}
