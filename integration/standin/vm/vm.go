// SPDX-License-Identifier: Apache-2.0

// Package vm starts a sandbox's virtiofsd and VMM, as Kata does for Cloud
// Hypervisor, and connects to the guest through the VMM's hybrid vsock socket.
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

// guestCID is the same for every guest: with hybrid vsock, guests are told
// apart by their sockets.
const guestCID = 3

// VM is a running virtual machine.
type VM struct {
	config  *config.Config
	socket  string // hybrid vsock
	dir     string
	api     *vmm
	vmm     *process
	virtio  *process
	stopped bool
}

// Start boots a VM with the cards that exports the directory shared to its
// guest. It returns when the VMM has accepted the boot request, long before the
// guest's agent answers.
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
	if c.Way == way.Go {
		go v.endWithVirtiofsd()
	}
	return v, nil
}

// endWithVirtiofsd ends a VM whose virtiofsd has exited, as Kata's Go shim does
// (src/runtime/virtcontainers/clh.go, setupVirtiofsDaemon). The Rust shim only
// logs it: what its guest asks of virtiofsd is never answered.
func (v *VM) endWithVirtiofsd() {
	select {
	case <-v.vmm.gone:
	case <-v.virtio.gone:
		log.L.Warn("virtiofsd has exited, and the VM ends")
		v.shutdown(context.Background())
	}
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

// Plug hotplugs network cards. The caller still owns their taps.
func (v *VM) Plug(ctx context.Context, cards []network.Card) error {
	for _, c := range cards {
		if err := v.api.addNet(ctx, netConfig{MAC: c.MAC, NumQueues: 2, QueueSize: 256}, c.Tap); err != nil {
			return err
		}
	}
	return nil
}

// commandLine is the kernel's command line, which contains the agent's
// settings.
func commandLine(c *config.Config) string {
	words := []string{"panic=1", "no_timer_check", "quiet", c.KernelParams}
	if c.DebugConsole {
		words = append(words, "agent.debug_console", fmt.Sprintf("agent.debug_console_vport=%d", api.DebugConsolePort))
	}
	return strings.Join(words, " ")
}

// startVirtiofsd starts virtiofsd with the arguments of the respective Kata
// shim: with a listening socket in the Go way, with a socket path in the Rust
// way.
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
			return nil, errors.New("exited before it created its socket")
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.end(0)
			return nil, fmt.Errorf("%s was not created in time", socket)
		}
	}
}

// Pid returns the VMM's pid, the only one of a sandbox that the engine sees.
func (v *VM) Pid() int { return v.vmm.cmd.Process.Pid }

// VirtiofsdPid returns virtiofsd's pid.
func (v *VM) VirtiofsdPid() int { return v.virtio.cmd.Process.Pid }

// Gone is closed when the VMM has exited, for whatever reason.
func (v *VM) Gone() <-chan struct{} { return v.vmm.gone }

// DialAgent connects to the guest's agent. It retries until the configured
// timeout, because the guest is booting.
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
			return nil, fmt.Errorf("the VM exited before its agent answered: %w", err)
		case <-ctx.Done():
			return nil, fmt.Errorf("the guest's agent did not answer within %s: %w", v.config.DialTimeout, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// dial connects to a port through a hybrid vsock socket: after a line in each
// direction the connection is the guest's.
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
	// The server does not speak first, so that the reader cannot contain
	// anything beyond the line.
	line, err := bufio.NewReaderSize(c, 32).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "OK") {
		c.Close()
		return nil, errors.Join(fmt.Errorf("port %d: answer %q", port, line), err)
	}
	_ = c.SetDeadline(time.Time{})
	return c, nil
}

// Stop stops the VM and virtiofsd. It may be called more than once.
func (v *VM) Stop(ctx context.Context) {
	if v.stopped {
		return
	}
	v.stopped = true
	if v.vmm != nil {
		v.shutdown(ctx)
	}
	if v.virtio != nil {
		// virtiofsd exits when its only client disconnects.
		v.virtio.end(2 * time.Second)
	}
}

// End ends the VM, and may be called beside Stop.
func (v *VM) End() { v.shutdown(context.Background()) }

// shutdown ends the VMM.
func (v *VM) shutdown(ctx context.Context) {
	if v.api != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := v.api.call(ctx, http.MethodPut, "vmm.shutdown", nil); err != nil {
			log.L.WithError(err).Info("failed to shut down vmm")
		}
	}
	v.vmm.end(5 * time.Second)
}

// RemoveFiles removes the VM's sockets.
func (v *VM) RemoveFiles() error { return os.RemoveAll(filepath.Clean(v.dir)) }
