// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// machine is a running QEMU with its helper processes.
type machine struct {
	qemu    *child
	qmp     *qmp
	vsock   *vsockDaemon
	proxy   *proxy
	console net.Conn
	reading sync.WaitGroup // the goroutine that reads the console
	nics    int            // cards so far, plugged or not
	plugged int            // those plugged in after the boot
}

// tapNIC is a network card from vm.add-net, with its taps.
type tapNIC struct {
	netConfig
	taps []*os.File
}

// boot starts the machine. The caller still owns the cards' descriptors; QEMU
// has copies.
func boot(c vmConfig, s Settings, name string, cards []tapNIC, logFile *os.File) (_ *machine, err error) {
	m := &machine{nics: len(cards)}
	defer func() {
		if err != nil {
			m.stop()
		}
	}()

	consoleLog, err := os.Create(filepath.Join(s.LogDir, name+".console"))
	if err != nil {
		return nil, fmt.Errorf("console log: %w", err)
	}
	line := newConsole(consoleLog, s.ReadySigns)
	ours, qemuConsole, err := socketPair()
	if err != nil {
		consoleLog.Close()
		return nil, fmt.Errorf("console: %w", err)
	}
	defer qemuConsole.Close()
	m.console = ours
	m.reading.Go(func() {
		defer consoleLog.Close()
		_, _ = io.Copy(line, ours) // until QEMU exits or stop is called
	})

	monitor, qemuMonitor, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("monitor: %w", err)
	}
	defer qemuMonitor.Close()
	m.qmp = newQMP(monitor)

	inherited := []*os.File{consoleFD - 3: qemuConsole, qmpFD - 3: qemuMonitor}
	next := firstFreeFD
	inherit := func(f *os.File) int {
		inherited = append(inherited, f)
		next++
		return next - 1
	}
	vsockFD := 0
	if c.Vsock != nil {
		if m.vsock, err = startVsock(s, c.Vsock.CID, logFile); err != nil {
			return nil, err
		}
		vsockFD = inherit(m.vsock.device)
		if m.proxy, err = startProxy(c.Vsock.Socket, line.ready, m.vsock.dial); err != nil {
			return nil, err
		}
	}
	var nics []nic
	for _, card := range cards {
		n := nic{netConfig: card.netConfig}
		for _, tap := range card.taps {
			n.fds = append(n.fds, inherit(tap))
		}
		nics = append(nics, n)
	}

	cmd := exec.Command(s.QEMU, arguments(c, s, name, nics, vsockFD)...)
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = inherited, logFile, logFile
	if m.qemu, err = startChild(cmd, s.Env); err != nil {
		return nil, fmt.Errorf("start qemu: %w", err)
	}
	return m, nil
}

func (m *machine) plug(card tapNIC) error {
	if m.plugged == hotplugSlots {
		return fmt.Errorf("all %d slots are taken", hotplugSlots)
	}
	if err := m.qmp.plugNIC(card.netConfig, card.taps, m.nics, m.plugged); err != nil {
		return err
	}
	m.nics++
	m.plugged++
	return nil
}

// stop kills all processes and waits for them.
func (m *machine) stop() {
	if m == nil {
		return
	}
	m.proxy.close()
	m.qemu.kill()
	m.vsock.close()
	if m.qmp != nil {
		m.qmp.conn.Close()
	}
	if m.console != nil {
		m.console.Close()
	}
	m.reading.Wait()
}

// socketPair returns a pair of connected sockets: one end for this process, one
// to pass to a child.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "pair"), os.NewFile(uintptr(fds[1]), "pair")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}
