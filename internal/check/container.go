// SPDX-License-Identifier: Apache-2.0

package check

import (
	"cmp"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

const (
	// defaultState is containerd's state directory unless it is configured.
	defaultState = "/run/containerd"
	// askTimeout bounds the answer of a shim, which may ask CRIU first.
	askTimeout = 2 * time.Minute
	// typicalRate is for the estimate of a freeze, in bytes a second: what a
	// guest writes through virtiofs to a local disk.
	typicalRate = 500 << 20
)

// Container reports whether a container can be checkpointed now: by its ID or
// the beginning of it, in a namespace of containerd or, if that is empty, in
// any. Nothing is frozen or changed.
func (h *Host) Container(ctx context.Context, namespace, id string) Findings {
	var f Findings
	var host Findings // its findings are not about the container
	d := h.containerd(ctx, &host)
	if d == nil {
		return host
	}
	b, err := findBundle(cmp.Or(d.state, defaultState), namespace, id)
	if err != nil {
		f.fail("container", "kata-checkpoint check, or name the namespace with --namespace; ctr -n NAMESPACE task ls lists those that run", "%v", err)
		return f
	}
	ctx = namespaces.WithNamespace(ctx, b.namespace)
	answer, err := b.ask(ctx)
	if err != nil {
		cure := "check that the container's shim runs: ctr -n " + b.namespace + " task ls"
		if status.Code(err) == codes.Unimplemented {
			cure = "create the container with the runtime " + Runtime + "; one of an earlier release has to be created again"
		}
		f.fail("container", cure, "the shim of container %s does not answer: %v", b.id, err)
		return f
	}
	f.ok("container", "%s in namespace %s is %s, with the shim of release %s", b.id, b.namespace, answer.GetState(), answer.GetShimVersion())
	if answer.GetAgentVersion() != "" {
		f.agent(answer)
	}
	for _, reason := range answer.GetReasons() {
		f.fail("container.checkpoint", "as the reason says; docs/limits.md has the background", "it cannot be checkpointed: %s", reason)
	}
	if len(answer.GetReasons()) > 0 {
		return f
	}
	after := "and keeps running afterwards"
	if answer.GetStops() {
		after = "and is stopped by it, unless the engine or the annotation kata-checkpoint.dev/after says otherwise"
	}
	if answer.GetUnchecked() {
		f.warn("container.checkpoint", "resume it and repeat the check", "the guest is fit for a checkpoint, but the container's processes were not looked at, because it is frozen")
	} else {
		f.ok("container.checkpoint", "it can be checkpointed now, %s", after)
	}
	h.size(ctx, b.id, &f)
	return f
}

// agent is what the agent reports of itself and the guest.
func (f *Findings) agent(r *api.CheckResponse) {
	v := r.GetCriuVersion()
	f.ok("container.guest", "agent %s, CRIU %d.%d.%d, Linux %s", r.GetAgentVersion(), v/10000, v/100%100, v%100, r.GetKernelRelease())
	if r.GetAgentVersion() != version.Version || r.GetShimVersion() != version.Version {
		f.ok("container.release", "it was started by another release than this, %s, and keeps that one", version.Version)
	}
}

// taskBundle is where containerd keeps a task.
type taskBundle struct{ namespace, id, dir string }

func findBundle(state, namespace, id string) (*taskBundle, error) {
	root := filepath.Join(state, "io.containerd.runtime.v2.task")
	if id == "" || strings.ContainsAny(id, "/*?[\\") {
		return nil, errcode.NoContainer.Errorf("%q is no ID of a container", id)
	}
	dirs, err := filepath.Glob(filepath.Join(root, cmp.Or(namespace, "*"), id+"*"))
	if err != nil {
		return nil, err
	}
	var found []*taskBundle
	for _, dir := range dirs {
		b := &taskBundle{namespace: filepath.Base(filepath.Dir(dir)), id: filepath.Base(dir), dir: dir}
		if b.id == id {
			found = append([]*taskBundle{b}, found...)
		} else {
			found = append(found, b)
		}
	}
	switch {
	case len(found) == 0:
		return nil, errcode.NoContainer.Errorf("no container with a task has the ID %s", id)
	case len(found) == 1, found[0].id == id && found[1].id != id:
		return found[0], nil
	}
	return nil, errcode.Ambiguous.Errorf("several containers have IDs that begin with %s: %s in %s, %s in %s", id, found[0].id, found[0].namespace, found[1].id, found[1].namespace)
}

// ask asks the container's shim.
func (b *taskBundle) ask(ctx context.Context) (*api.CheckResponse, error) {
	data, err := os.ReadFile(filepath.Join(b.dir, "bootstrap.json"))
	if err != nil {
		return nil, err
	}
	var bootstrap struct {
		Address string `json:"address"`
	}
	if err := json.Unmarshal(data, &bootstrap); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(bootstrap.Address, "unix://"))
	if err != nil {
		return nil, err
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	return api.NewShimClient(c).Check(ctx, &api.CheckRequest{ContainerId: b.id})
}

// size estimates what a checkpoint would write, by the memory that the container
// uses.
func (h *Host) size(ctx context.Context, id string, f *Findings) {
	conn, err := grpc.NewClient("unix://"+h.Containerd, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return
	}
	defer conn.Close()
	resp, err := tasks.NewTasksClient(conn).Metrics(ctx, &tasks.MetricsRequest{Filters: []string{"id==" + id}})
	if err != nil || len(resp.GetMetrics()) != 1 {
		return
	}
	bytes, ok := memory(resp.GetMetrics()[0].GetData())
	if !ok {
		return
	}
	f.ok("container.size", "about %.1f MiB of memory will be written; it is frozen meanwhile, about %.1f s at %d MiB/s", float64(bytes)/(1<<20), 0.2+float64(bytes)/typicalRate, typicalRate>>20)
	var room Findings
	h.room(bytes, &room)
	*f = append(*f, room...)
}

// memory is the memory of a container that an image set contains: what is not a
// cache of files.
func memory(data typeurl.Any) (uint64, bool) {
	v, err := typeurl.UnmarshalAny(data)
	if err != nil {
		return 0, false
	}
	switch m := v.(type) {
	case *cgroup2.Metrics:
		return m.GetMemory().GetAnon() + m.GetMemory().GetShmem(), m.GetMemory() != nil
	case *cgroup1.Metrics:
		return m.GetMemory().GetTotalRSS(), m.GetMemory() != nil
	}
	return 0, false
}
