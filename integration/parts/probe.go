// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/log"
)

// probeLimit is longer than a boot under KVM.
const probeLimit = 10 * time.Second

// probeSign is printed by the guest's /init if it sees the kernel parameter
// testbed.probe.
const probeSign = "testbed: the probe has booted"

// KVMWorks reports whether this machine's KVM boots the guest. /dev/kvm proves
// nothing: on some clouds it can be opened, but every stock kernel hangs. The
// result is cached for this kernel until the machine's next boot.
func (p *Parts) KVMWorks(ctx context.Context, initrd string) (bool, error) {
	device, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false, nil //nolint:nilerr // no KVM is a result, not a failure
	}
	device.Close()
	kernel, version, err := Kernel()
	if err != nil {
		return false, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, fmt.Errorf("probe kvm: %w", err)
	}
	path, err := p.once(ctx, "kvm-probe", keyOf(version, string(boot)), func(ctx context.Context, path string) error {
		outcome := "hangs"
		if probe(ctx, kernel, initrd) {
			outcome = "works"
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return os.WriteFile(path, []byte(outcome), 0o644)
	})
	if err != nil {
		return false, err
	}
	outcome, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return string(outcome) == "works", err
}

func probe(ctx context.Context, kernel, initrd string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "1024M", "-nodefaults", "-no-user-config",
		"-nographic", "-no-reboot", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 reboot=t testbed.probe").CombinedOutput()
	works := strings.Contains(string(out), probeSign)
	log.G(ctx).WithField("works", works).WithError(err).Info("probed kvm")
	return works
}
