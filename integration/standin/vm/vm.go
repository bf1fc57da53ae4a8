// Package vm starts a sandbox's virtiofsd and its VMM, as Kata does for Cloud
// Hypervisor, and reaches the guest by the VMM's hybrid vsock socket.
package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/config"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/network"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// guestCID is the same for every guest: with hybrid vsock a sandbox's socket is
// what tells guests apart.
const guestCID = 3

// VM is a running one.
type VM struct {
	config  *config.Config
	socket  string // hybrid vsock
	dir     string
	api     *vmm
	vmm     *process
	virtio  *process
	stopped bool
}

// Start boots a VM that shows shared to its guest. It returns when the VMM has
// taken the order to boot, long before the guest's agent answers. The cards are
// there when the guest boots.
func Start(ctx context.Context, c *config.Config, sandbox, shared string, ns *netns.Namespace, cards []network.Card) (_ *VM, err error) {
	v := &VM{config: c, socket: c.Way.VsockSocket(sandbox), dir: c.Way.VMDir(sandbox)}
	if err := os.MkdirAll(v.dir, 0o750); err != nil {
		return nil, fmt.Errorf("start the VM: %w", err)
	}
	defer func() {
		if err != nil {
			v.Stop(ctx)
		}
	}()
	virtiofs := c.Way.VirtiofsSocket(sandbox)
	if v.virtio, err = startVirtiofsd(c, virtiofs, shared); err != nil {
		return nil, fmt.Errorf("start virtiofsd: %w", err)
	}
	apiSocket := c.Way.APISocket(sandbox)
	err = ns.Do(func() error {
		v.vmm, err = start(exec.Command(c.VMM, "--api-socket", apiSocket))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start the VMM: %w", err)
	}
	if err := v.boot(ctx, apiSocket, virtiofs, cards); err != nil {
		return nil, fmt.Errorf("boot the VM: %w", err)
	}
	return v, nil
}

func (v *VM) boot(ctx context.Context, apiSocket, virtiofs string, cards []network.Card) error {
	v.api = newVMM(apiSocket)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := v.api.waitFor(ctx, v.vmm.gone); err != nil {
		return err
	}
	c := v.config
	err := v.api.call(ctx, http.MethodPut, "vm.create", vmConfig{
		CPUs:    cpus{Boot: c.VCPUs, Max: c.VCPUs},
		Memory:  memory{Size: c.MemoryMiB << 20, Shared: true},
		Payload: payload{Kernel: c.Kernel, Cmdline: commandLine(c), Initramfs: c.Initrd},
		FS:      []fs{{Tag: api.Tag, Socket: virtiofs, NumQueues: 1, QueueSize: 1024}},
		Vsock:   vsock{CID: guestCID, Socket: v.socket},
		Serial:  console{Mode: "Null"},
		Console: console{Mode: "Off"},
	})
	if err != nil {
		return err
	}
	if err := v.Plug(ctx, cards); err != nil {
		return err
	}
	return v.api.call(ctx, http.MethodPut, "vm.boot", nil)
}

// Plug gives the VM more network cards. Their taps stay the caller's.
func (v *VM) Plug(ctx context.Context, cards []network.Card) error {
	for _, c := range cards {
		if err := v.api.addNet(ctx, netConfig{MAC: c.MAC, NumQueues: 2, QueueSize: 256}, c.Tap); err != nil {
			return err
		}
	}
	return nil
}

// commandLine is the kernel's. The agent finds its own settings there.
func commandLine(c *config.Config) string {
	words := []string{"panic=1", "no_timer_check", "quiet", c.KernelParams}
	if c.DebugConsole {
		words = append(words, "agent.debug_console", fmt.Sprintf("agent.debug_console_vport=%d", api.DebugConsolePort))
	}
	return strings.Join(words, " ")
}

// startVirtiofsd hands the Go way's a listening socket, and has the Rust way's
// make its own, with the arguments that each of Kata's shims gives.
func startVirtiofsd(c *config.Config, socket, shared string) (*process, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if c.Way == way.Go {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err != nil {
			return nil, err
		}
		l.SetUnlinkOnClose(false)
		defer l.Close()
		f, err := l.File()
		if err != nil {
			return nil, err
		}
		defer f.Close()
		args := append([]string{"--syslog", "--cache=auto", "--shared-dir=" + shared, "--fd=3"}, c.VirtioFSArgs...)
		cmd := exec.Command(c.VirtioFSD, args...)
		cmd.ExtraFiles = []*os.File{f}
		return start(cmd)
	}
	args := append([]string{"--socket-path", socket, "--shared-dir", shared, "--cache", "auto"}, c.VirtioFSArgs...)
	p, err := start(exec.Command(c.VirtioFSD, args...))
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, err := os.Stat(socket); err == nil {
			return p, nil
		}
		select {
		case <-p.gone:
			return nil, errors.New("ended before its socket was there")
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.end(0)
			return nil, fmt.Errorf("%s did not appear", socket)
		}
	}
}

// Pid is the VMM's, the only one of a sandbox that the engine ever sees.
func (v *VM) Pid() int { return v.vmm.cmd.Process.Pid }

// VirtiofsdPid is virtiofsd's.
func (v *VM) VirtiofsdPid() int { return v.virtio.cmd.Process.Pid }

// Gone is closed when the VMM has ended, for whatever reason.
func (v *VM) Gone() <-chan struct{} { return v.vmm.gone }

// DialAgent connects to the guest's agent, and keeps trying as long as the
// configuration allows: the guest is booting.
func (v *VM) DialAgent(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, v.config.DialTimeout)
	defer cancel()
	for {
		c, err := dial(ctx, v.socket, api.Port)
		if err == nil {
			return c, nil
		}
		select {
		case <-v.Gone():
			return nil, fmt.Errorf("the VM ended before its agent answered: %w", err)
		case <-ctx.Done():
			return nil, fmt.Errorf("the guest's agent did not answer within %s: %w", v.config.DialTimeout, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// dial asks a hybrid vsock socket for a port: one line to and one line fro, and
// then the connection is the guest's.
func dial(ctx context.Context, socket string, port uint32) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(deadline)
	}
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
		c.Close()
		return nil, err
	}
	// The server speaks only after the client has, so nothing beyond the line
	// can be in the reader.
	line, err := bufio.NewReaderSize(c, 32).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "OK") {
		c.Close()
		return nil, errors.Join(fmt.Errorf("port %d: answer %q", port, line), err)
	}
	_ = c.SetDeadline(time.Time{})
	return c, nil
}

// Stop ends the VM and virtiofsd. It may be called more than once.
func (v *VM) Stop(ctx context.Context) {
	if v.stopped {
		return
	}
	v.stopped = true
	if v.vmm != nil {
		if v.api != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := v.api.call(ctx, http.MethodPut, "vmm.shutdown", nil); err != nil {
				log.L.WithError(err).Info("the VMM did not take its shutdown")
			}
		}
		v.vmm.end(5 * time.Second)
	}
	if v.virtio != nil {
		// virtiofsd ends when its only client hangs up.
		v.virtio.end(2 * time.Second)
	}
}

// RemoveFiles takes the VM's sockets away.
func (v *VM) RemoveFiles() error { return os.RemoveAll(filepath.Clean(v.dir)) }
