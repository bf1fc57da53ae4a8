// SPDX-License-Identifier: Apache-2.0

package check

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	containers "github.com/containerd/containerd/api/services/containers/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// guestNamespace is containerd's namespace of the container that looks at the
	// guest.
	guestNamespace = "kata-checkpoint-check"
	// ProbeCommand is the command of kata-checkpoint that runs in that container.
	ProbeCommand = "guest-probe"
	// bootTimeout bounds the start of a VM, which takes longest without KVM.
	bootTimeout = 3 * time.Minute
)

// Guest starts a container with our runtime, asks the agent in its guest what it
// can do, checkpoints the container, and removes it.
func (h *Host) Guest(ctx context.Context) (f Findings) {
	const check = "guest"
	conn, err := grpc.NewClient("unix://"+h.Containerd, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		f.fail(check, "name containerd's socket with --address", "%s is not a socket: %v", h.Containerd, err)
		return f
	}
	defer conn.Close()
	var host Findings
	d := h.containerd(ctx, &host)
	if d == nil {
		return f // the host's findings have it
	}
	p := &probe{
		containers: containers.NewContainersClient(conn), tasks: tasks.NewTasksClient(conn),
		id: fmt.Sprintf("kata-checkpoint-check-%d", os.Getpid()), state: cmp.Or(d.state, defaultState),
	}
	if p.dir, err = os.MkdirTemp(cmp.Or(h.probeDir, "/var/tmp"), "kata-checkpoint-check-"); err != nil {
		f.fail(check, "run this as root", "%v", err)
		return f
	}
	ctx = namespaces.WithNamespace(ctx, guestNamespace)
	defer func() {
		// Also if the user has interrupted the check.
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), bootTimeout)
		defer cancel()
		if err := p.remove(uctx); err != nil {
			f.warn(check+".remove", fmt.Sprintf("ctr -n %s task rm -f %s; ctr -n %[1]s container rm %[2]s; rm -r %s", guestNamespace, p.id, p.dir), "the container of the check was not removed: %v", err)
		}
	}()
	begin := time.Now()
	if err := p.start(ctx); err != nil {
		f.fail(check+".start", "cure what kata-checkpoint check finds on the host, and see the log of containerd", "no container starts with %s: %v", Runtime, err)
		return f
	}
	f.ok(check+".start", "a container has started in a VM of its own in %.1f s", time.Since(begin).Seconds())
	answer, err := (&taskBundle{namespace: guestNamespace, id: p.id, dir: filepath.Join(p.state, "io.containerd.runtime.v2.task", guestNamespace, p.id)}).ask(ctx)
	if err != nil {
		f.fail(check+".agent", "install the shim of this release: kata-checkpoint install", "the shim does not answer: %v", err)
		return f
	}
	if answer.GetAgentVersion() != "" {
		v := answer.GetCriuVersion()
		f.ok(check+".agent", "agent %s answers over vsock, with CRIU %d.%d.%d on Linux %s", answer.GetAgentVersion(), v/10000, v/100%100, v%100, answer.GetKernelRelease())
	}
	h.probed(p, &f)
	for _, reason := range answer.GetReasons() {
		f.fail(check+".criu", "as the reason says", "no container can be checkpointed: %s", reason)
	}
	if len(answer.GetReasons()) > 0 {
		return f
	}
	f.ok(check+".criu", "CRIU works on this kernel, by criu check")
	begin = time.Now()
	if err := p.checkpoint(ctx); err != nil {
		f.fail(check+".checkpoint", "see the log of containerd", "a checkpoint fails: %v", err)
		return f
	}
	took := time.Since(begin)
	f.ok(check+".checkpoint", "a container with %d MiB was checkpointed in %.1f s, %.0f MiB/s", probeBytes>>20, took.Seconds(), float64(probeBytes>>20)/took.Seconds())
	return f
}

// probed reports what the container has found in its guest, and whether what the
// one side has written is what the other reads.
func (h *Host) probed(p *probe, f *Findings) {
	const share, kernel = "guest.virtiofs", "guest.kernel"
	cure := "look at the log of virtiofsd, and at what Kata's configuration sets for it (virtio_fs_cache, virtio_fs_extra_args)"
	root := filepath.Join(p.dir, "rootfs")
	sum, err := arrived(root, toHostName)
	switch {
	case err != nil || sum != p.answer.Written.Sum:
		f.fail(share, cure, "what the guest has written is not what arrives on the host")
	case p.sent != p.answer.Read.Sum:
		f.fail(share, cure, "what the guest reads is not what the host has written")
	default:
		f.ok(share, "the guest reads %.0f MiB/s from the host and writes %.0f MiB/s to it", p.answer.Read.rate(), p.answer.Written.rate())
	}
	var lacks []string
	tried := 0
	for _, o := range KernelOptions {
		switch {
		case slices.Contains(p.answer.Unknown, o):
			continue
		case slices.Contains(p.answer.Lacks, o) && o != optionalOption:
			lacks = append(lacks, o)
		}
		tried++
	}
	if len(lacks) > 0 {
		f.fail(kernel, "kata-checkpoint guest-kernel && kata-checkpoint install", "the kernel that the guest runs lacks %s: CRIU does not work there, or not with every container", strings.Join(lacks, ", "))
		return
	}
	f.ok(kernel, "the kernel that the guest runs has each of the %d options that can be tried in it", tried)
}

// probe is the container that looks at the guest.
type probe struct {
	containers containers.ContainersClient
	tasks      tasks.TasksClient
	id, dir    string
	state      string
	created    bool
	running    bool
	// sent is the sum of the file that it reads, answer what it has found.
	sent   uint32
	answer probed
}

// start starts the container and waits until its process has filled its memory.
func (p *probe) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	rootfs := filepath.Join(p.dir, "rootfs")
	for _, dir := range []string{"proc", "dev", "ready"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			return err
		}
	}
	if err := copySelf(filepath.Join(rootfs, "probe")); err != nil {
		return err
	}
	sent, err := writeTransfer(filepath.Join(rootfs, fromHostName))
	if err != nil {
		return err
	}
	p.sent = sent.Sum
	spec, err := json.Marshal(p.spec())
	if err != nil {
		return err
	}
	_, err = p.containers.Create(ctx, &containers.CreateContainerRequest{Container: &containers.Container{
		ID: p.id, Runtime: &containers.Container_Runtime{Name: Runtime},
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: spec},
	}})
	if err != nil {
		return err
	}
	p.created = true
	_, err = p.tasks.Create(ctx, &tasks.CreateTaskRequest{
		ContainerID: p.id, Rootfs: []*types.Mount{{Type: "bind", Source: rootfs, Options: []string{"rbind", "rw"}}},
	})
	if err != nil {
		return err
	}
	p.running = true
	if _, err = p.tasks.Start(ctx, &tasks.StartRequest{ContainerID: p.id}); err != nil {
		return err
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		// What the guest writes is seen on the host.
		if p.answer, err = readAnswer(rootfs); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("its process does not get ready, or what it writes does not arrive on the host: %w", ctx.Err())
		}
	}
}

func (p *probe) spec() *specs.Spec {
	netAdmin := []string{"CAP_NET_ADMIN"} // in a network namespace of its own
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: []string{"/probe", ProbeCommand}, Cwd: "/", Env: []string{"PATH=/"},
			Capabilities: &specs.LinuxCapabilities{Bounding: netAdmin, Permitted: netAdmin, Effective: netAdmin},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/" + guestNamespace + "/" + p.id,
			Resources:   &specs.LinuxResources{},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
		},
	}
}

// copySelf copies this program, which is linked statically.
func copySelf(to string) error {
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// checkpoint makes a checkpoint as ctr does, which pauses the container before
// and resumes it afterwards.
func (p *probe) checkpoint(ctx context.Context) error {
	images := filepath.Join(p.dir, "images")
	if err := os.Mkdir(images, 0o700); err != nil {
		return err
	}
	options, err := typeurl.MarshalAnyToProto(&runcoptions.CheckpointOptions{ImagePath: images})
	if err != nil {
		return err
	}
	if _, err := p.tasks.Pause(ctx, &tasks.PauseTaskRequest{ContainerID: p.id}); err != nil {
		return err
	}
	_, err = p.tasks.Checkpoint(ctx, &tasks.CheckpointTaskRequest{ContainerID: p.id, Options: options})
	if _, rerr := p.tasks.Resume(ctx, &tasks.ResumeTaskRequest{ContainerID: p.id}); err == nil {
		err = rerr
	}
	return err
}

// remove ends and removes the container.
func (p *probe) remove(ctx context.Context) error {
	if p.running {
		if _, err := p.tasks.Kill(ctx, &tasks.KillRequest{ContainerID: p.id, Signal: uint32(syscall.SIGKILL), All: true}); err == nil {
			_, _ = p.tasks.Wait(ctx, &tasks.WaitRequest{ContainerID: p.id}) // Delete reports if it has not ended
		}
		if _, err := p.tasks.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: p.id}); err != nil {
			return err
		}
	}
	if p.created {
		if _, err := p.containers.Delete(ctx, &containers.DeleteContainerRequest{ID: p.id}); err != nil {
			return err
		}
	}
	return os.RemoveAll(p.dir)
}
