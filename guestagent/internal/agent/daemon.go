// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// Modes of the agent's binary, by its first argument, beside those of package
// api, in which the shim has it started.
const (
	DaemonMode = "daemon"
)

// lockPath is locked by the guest's only daemon. It is outside of
// api.StateDir, which is mounted over.
const lockPath = "/run/kata-checkpoint.lock"

// settings are in agent.json in the guest bundle.
type settings struct {
	// VsockPort is the AF_VSOCK port to listen on.
	VsockPort uint32 `json:"vsock_port"`
}

// Hook is Kata's prestart hook, run for every container with its OCI state on
// stdin: it makes sure that the daemon runs and returns at once. executable is
// the hook's own path, BUNDLE/hooks/prestart/NAME.
func Hook(executable string, state io.Reader) error {
	// The kata-agent waits until the state has been read.
	if _, err := io.Copy(io.Discard, state); err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	lock, err := takeLock()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	lock.Close() // the daemon locks it; if two start, the second one exits
	bundle := filepath.Dir(filepath.Dir(filepath.Dir(executable)))
	cmd := exec.Command(filepath.Join(bundle, api.AgentBinary), DaemonMode)
	cmd.Dir = "/"
	// The kata-agent waits until the hook's output is closed: the daemon has
	// none.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// The daemon inherits it, see smallPages. If it fails, the daemon uses more
	// memory.
	_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	return cmd.Process.Release()
}

func takeLock() (*os.File, error) {
	f, err := os.OpenFile(lockPath, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Daemon serves until the guest shuts down. executable is BUNDLE/bin/NAME.
func Daemon(ctx context.Context, executable string) error {
	lock, err := takeLock()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	// The idle daemon is small: memory that an operation used is freed soon.
	debug.SetGCPercent(50)
	if err := smallPages(); err != nil {
		log.G(ctx).WithError(err).Warn("failed to disable huge pages for the heap")
	}
	configureGuest()

	bundle := filepath.Dir(filepath.Dir(executable))
	set, err := readSettings(filepath.Join(bundle, "agent.json"))
	if err != nil {
		return err
	}
	a, err := New(bundle)
	if err != nil {
		return err
	}
	if f, err := openLog(filepath.Join(api.StateDir, "agent.log")); err == nil {
		log.L.Logger.SetOutput(f)
	}
	if err := a.takeOver(); err != nil {
		log.G(ctx).WithError(err).Error("failed to clean up after an earlier agent")
	}
	listener, err := vsock.Listen(set.VsockPort, nil)
	if err != nil {
		return fmt.Errorf("listen on vsock port %d: %w", set.VsockPort, err)
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.guard))
	if err != nil {
		return err
	}
	api.RegisterAgentService(server, a)
	log.G(ctx).WithFields(log.Fields{"version": version.Version, "port": set.VsockPort, "bundle": bundle}).Info("agent is serving")
	return server.Serve(ctx, hostOnly{listener})
}

// smallPages excludes the heap from transparent huge pages: an idle agent needs
// only a little of each, and each is resident as a whole. Until here the
// setting that the hook made has had that effect. It is reset, as processes
// that the agent starts would inherit it.
func smallPages() (err error) {
	defer func() { err = errclass.Join(err, unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)) }()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		var begin, end uintptr
		var perms, offset, device string
		var inode uint64
		if _, err := fmt.Sscanf(line, "%x-%x %s %s %s %d", &begin, &end, &perms, &offset, &device, &inode); err != nil {
			return fmt.Errorf("parse own mappings: %q: %w", line, err)
		}
		if perms != "rw-p" || inode != 0 {
			continue
		}
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, begin, end-begin, unix.MADV_NOHUGEPAGE)
		if errno != 0 && errno != unix.EINVAL { // a kernel without huge pages
			return fmt.Errorf("advise %x-%x: %w", begin, end, errno)
		}
	}
	return nil
}

func readSettings(path string) (settings, error) {
	s := settings{VsockPort: api.DefaultPort}
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("read %s: %w", path, err)
	}
	return s, nil
}

// configureGuest moves the daemon out of the cgroup of the hook, makes it the
// last victim of the OOM killer, and disables MPTCP in the guest's network
// namespace, which all containers share: CRIU cannot dump MPTCP sockets, and
// programs that request one (Go's servers do since 1.24) fall back to TCP. None
// of it is vital.
func configureGuest() {
	for path, value := range map[string]string{
		"/sys/fs/cgroup/cgroup.procs": "0",
		"/proc/self/oom_score_adj":    "-999",
		"/proc/sys/net/mptcp/enabled": "0",
	} {
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			log.L.WithError(err).Debugf("failed to write %s", path)
		}
	}
}

// hostOnly accepts connections from the host and closes all others: a process
// in a container shares the guest's network and could dial the port itself.
type hostOnly struct{ net.Listener }

func (l hostOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if peer, ok := c.RemoteAddr().(*vsock.Addr); ok && peer.ContextID == vsock.Host {
			return c, nil
		}
		log.L.WithField("peer", c.RemoteAddr()).Warn("refused a connection that is not from the host")
		c.Close()
	}
}
