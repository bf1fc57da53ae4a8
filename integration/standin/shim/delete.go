// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/mount"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/sandbox"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// remove implements `delete`, which containerd runs when a shim is gone. The
// answer does not depend on what it finds.
func remove(w way.Way, f *flags) error {
	bundle, kind, id, err := sandboxOf(f.id)
	if err != nil {
		return err
	}
	if kind.OwnsSandbox() {
		if w == way.Rust {
			killShim()
		}
		if err := sandbox.RemoveRemains(w, id); err != nil {
			return err
		}
	}
	if err := mount.UnmountAll(rootfs(bundle), 0); err != nil {
		return err
	}
	return write(&task.DeleteResponse{ExitStatus: 128 + uint32(syscall.SIGKILL), ExitedAt: timestamppb.New(time.Now())})
}

// killShim kills the shim that the bundle names, if the process still is one.
func killShim() {
	raw, err := os.ReadFile("shim.pid")
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid <= 1 {
		return
	}
	exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	if err == nil && strings.HasPrefix(exe, executable()) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}
