// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"strconv"
	"strings"
)

// vmConfig is the part of vm.create's body that becomes QEMU's command line;
// the rest is only returned by vm.info.
type vmConfig struct {
	Payload struct {
		Kernel    string `json:"kernel"`
		Cmdline   string `json:"cmdline"`
		Initramfs string `json:"initramfs"`
	} `json:"payload"`
	CPUs struct {
		Boot int `json:"boot_vcpus"`
		Max  int `json:"max_vcpus"`
	} `json:"cpus"`
	Memory struct {
		Size int64 `json:"size"`
	} `json:"memory"`
	Disks []diskConfig `json:"disks"`
	Fs    []fsConfig   `json:"fs"`
	Vsock *vsockConfig `json:"vsock"`
}

type diskConfig struct {
	Path     string `json:"path"`
	ReadOnly bool   `json:"readonly"`
}

type fsConfig struct {
	Tag    string `json:"tag"`
	Socket string `json:"socket"`
}

type vsockConfig struct {
	CID    uint32 `json:"cid"`
	Socket string `json:"socket"`
}

type netConfig struct {
	ID  string `json:"id"`
	MAC string `json:"mac"`
}

// Descriptors that QEMU inherits: os/exec numbers extra files from 3.
const (
	consoleFD = 3 + iota
	qmpFD
	firstFreeFD
)

// hotplugSlots is how many network cards can be plugged in after the boot:
// q35's own bus supports no hotplug.
const hotplugSlots = 4

const defaultMemory = 1 << 30

// nic is a network card with its tap's descriptors, one for each queue.
type nic struct {
	netConfig
	fds []int // as QEMU sees them
}

// arguments returns QEMU's command line. vsockFD is QEMU's descriptor of a
// connection to the vsock daemon, or 0 for none.
func arguments(c vmConfig, s Settings, name string, nics []nic, vsockFD int) []string {
	size := c.Memory.Size
	if size == 0 {
		size = defaultMemory
	}
	memory := fmt.Sprintf("%dM", size>>20)
	accel, cpu := "kvm", "host"
	if s.Accel == AccelTCG {
		// A large translation cache: with the default, this guest flushes its
		// translations several times during a boot.
		accel, cpu = "tcg,thread=multi,tb-size=512", "max"
	}
	args := []string{
		"-name", "guest=" + name,
		"-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(max(c.CPUs.Boot, 1)), "-m", memory,
		"-machine", "q35,memory-backend=mem,usb=off,vmport=off,smbus=off,graphics=off",
		// vhost-user devices are other processes, which map the guest's memory.
		"-object", "memory-backend-memfd,id=mem,share=on,size=" + memory,
		// The smallest firmware that boots a kernel: half a second faster than
		// the default under TCG.
		"-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", consoleFD), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", qmpFD), "-mon", "chardev=qmp,mode=control",
		"-kernel", c.Payload.Kernel, "-append", commandLine(c.Payload.Cmdline, s),
	}
	if c.Payload.Initramfs != "" {
		args = append(args, "-initrd", c.Payload.Initramfs)
	}
	for i := range hotplugSlots {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=slot%d,chassis=%d", i, i+1))
	}
	for i, d := range c.Disks {
		args = append(args,
			"-drive", fmt.Sprintf("file=%s,if=none,id=disk%d,format=raw,readonly=%s", escape(d.Path), i, onOff(d.ReadOnly)),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	for i, f := range c.Fs {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=fs%d,path=%s", i, escape(f.Socket)),
			"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=fs%d,tag=%s", i, escape(f.Tag)))
	}
	if vsockFD != 0 {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=vsock,fd=%d", vsockFD),
			"-device", "vhost-user-vsock-pci,chardev=vsock")
	}
	for i, n := range nics {
		tap, card := n.properties(i)
		args = append(args, "-netdev", tap, "-device", card)
	}
	return args
}

func (n nic) properties(i int) (netdev, device string) {
	device = fmt.Sprintf("virtio-net-pci,netdev=net%d,romfile=", i)
	if n.MAC != "" {
		device += ",mac=" + n.MAC
	}
	if len(n.fds) == 1 {
		return fmt.Sprintf("tap,id=net%d,fd=%d", i, n.fds[0]), device
	}
	fds := make([]string, len(n.fds))
	for k, fd := range n.fds {
		fds[k] = strconv.Itoa(fd)
	}
	// One vector for each direction of each queue, one for configuration
	// changes, one for the control queue.
	return fmt.Sprintf("tap,id=net%d,fds=%s", i, strings.Join(fds, ":")), fmt.Sprintf("%s,mq=on,vectors=%d", device, 2*len(n.fds)+2)
}

// commandLine is the kernel's command line: Kata's, then QEMU's additions. Kata
// names Cloud Hypervisor's consoles, and the last console= wins.
func commandLine(kata string, s Settings) string {
	words := []string{kata, "console=ttyS0", "reboot=t"}
	if s.Accel == AccelTCG {
		// Under TCG on a loaded machine the kernel's check of the timer
		// interrupt misses its few ticks and panics.
		words = append(words, "no_timer_check")
	}
	if s.KernelParams != "" {
		words = append(words, s.KernelParams)
	}
	return strings.Join(words, " ")
}

// escape doubles commas, QEMU's separator.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}
