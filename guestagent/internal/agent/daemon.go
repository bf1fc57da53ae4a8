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
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// Modes of the agent's binary, by its first argument, beside those of package
// api, in which the shim has it started.
const (
	DaemonMode = "daemon"
	SpawnMode  = "spawn"
	FirstMode  = "first"
)

// lockPath is locked by the one daemon of a guest. It is outside of
// api.StateDir, which is mounted over.
const lockPath = "/run/kata-checkpoint.lock"

// settings are in agent.json in the guest bundle.
type settings struct {
	// VsockPort is the AF_VSOCK port to listen on.
	VsockPort uint32 `json:"vsock_port"`
}

// Hook is what Kata runs for every container, with its OCI state on stdin: it
// leaves one daemon in the guest and returns at once. executable is the hook's
// own path, BUNDLE/hooks/prestart/NAME.
func Hook(executable string, state io.Reader) error {
	// Kata's agent waits until somebody has read what it writes.
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
	lock.Close() // for the daemon to take; should two start, one finds it taken
	bundle := filepath.Dir(filepath.Dir(filepath.Dir(executable)))
	cmd := exec.Command(filepath.Join(bundle, api.AgentBinary), DaemonMode)
	cmd.Dir = "/"
	// Kata's agent waits for the end of the hook's output: the daemon has none.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// For the daemon, see smallPages. Where it fails the daemon is larger.
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

// Daemon serves until the guest ends. executable is BUNDLE/bin/NAME.
func Daemon(ctx context.Context, executable string) error {
	lock, err := takeLock()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	// Small when idle: what an operation took goes back soon.
	debug.SetGCPercent(50)
	if err := smallPages(); err != nil {
		log.G(ctx).WithError(err).Warn("huge pages for the heap")
	}
	settle()

	bundle := filepath.Dir(filepath.Dir(executable))
	set, err := readSettings(filepath.Join(bundle, "agent.json"))
	if err != nil {
		return err
	}
	a, err := New(bundle)
	if err != nil {
		return err
	}
	if f, err := os.OpenFile(filepath.Join(api.StateDir, "agent.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err == nil {
		log.L.Logger.SetOutput(f)
	}
	if err := a.takeOver(); err != nil {
		log.G(ctx).WithError(err).Error("what an earlier agent left")
	}
	listener, err := vsock.Listen(set.VsockPort, nil)
	if err != nil {
		return fmt.Errorf("listen on vsock port %d: %w", set.VsockPort, err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	api.RegisterAgentService(server, a)
	log.G(ctx).WithFields(log.Fields{"version": version.Version, "port": set.VsockPort, "bundle": bundle}).Info("agent serves")
	return server.Serve(ctx, hostOnly{listener})
}

// smallPages has the kernel use no huge pages for the heap: each is in memory
// as a whole for the little of it that an idle agent needs. Until now the hook's
// word was for that. It ends here: what the agent starts would inherit it.
func smallPages() (err error) {
	defer func() { err = errors.Join(err, unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)) }()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		var begin, end uintptr
		var perms, offset, device string
		var inode uint64
		if _, err := fmt.Sscanf(line, "%x-%x %s %s %s %d", &begin, &end, &perms, &offset, &device, &inode); err != nil {
			return fmt.Errorf("read own mappings: %q: %w", line, err)
		}
		if perms != "rw-p" || inode != 0 {
			continue
		}
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, begin, end-begin, unix.MADV_NOHUGEPAGE)
		if errno != 0 && errno != unix.EINVAL { // a kernel that has none
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

// settle takes the daemon out of whatever cgroup the hook ran in, and out of
// the reach of the OOM killer; and it switches MPTCP off in the guest's network
// namespace, which all containers are in: CRIU cannot dump its sockets, and
// programs that ask for one (Go's servers do from 1.24 on) take TCP without it.
// None of it is vital.
func settle() {
	for path, value := range map[string]string{
		"/sys/fs/cgroup/cgroup.procs": "0",
		"/proc/self/oom_score_adj":    "-999",
		"/proc/sys/net/mptcp/enabled": "0",
	} {
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			log.L.WithError(err).Debugf("write %s", path)
		}
	}
}

// hostOnly takes connections from the host and closes all others: a process
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
		log.L.WithField("peer", c.RemoteAddr()).Warn("refused a connection that is not the host's")
		c.Close()
	}
}
