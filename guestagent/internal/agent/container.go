// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/exechelper"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/lazyregexp"
)

// restoredCgroup is the child of a container's cgroup with the restored
// processes, which are frozen without their placeholder.
const restoredCgroup = "restored"

// container is the agent's record of a container. It is also kept in a file,
// for an agent that is restarted.
type container struct {
	ID string `json:"id"`
	// Init is the process that Kata started: the container's init, or its
	// placeholder.
	Init process `json:"init"`
	// Cgroup is the directory of the container's cgroup.
	Cgroup string `json:"cgroup"`
	// Stdio are the descriptors 0 to 2 that Kata gave to Init.
	Stdio []*api.Stdio `json:"stdio"`
	// Restored is the root of the restored processes, if there are any.
	Restored *process `json:"restored,omitempty"`
	// Helper is the file that Kata executes in the placeholder's mount namespace
	// for an exec, see [exechelper.Mount].
	Helper exechelper.FileID `json:"helper,omitzero"`
	// NetworkLocked reports that its TCP connections may be locked, see
	// [Agent.lockNetwork].
	NetworkLocked bool `json:"networkLocked,omitempty"`
	// KeepAlive are the connections whose keepalive is disabled while they are
	// locked.
	KeepAlive []netlock.Endpoints `json:"keepAlive,omitempty"`
	// Mounts are those that the container was created with. Without them, in a
	// record of an agent that did not note them, every mount counts as one of
	// those.
	Mounts []inspect.Point `json:"mounts,omitempty"`
	// Shm is the device number of the /dev/shm that the container was created with;
	// 0: it has none. In a record of an agent that did not note it, it is nil.
	Shm *uint64 `json:"shm,omitempty"`
	// Token is what every request for the container has to have; empty: the shim
	// that the container was adopted for sends none.
	Token string `json:"token,omitempty"`
	// Owner is the owner of the leases that count for the container; empty: all do.
	Owner string `json:"owner,omitempty"`
}

// noteMounts notes the mounts of a created container, before its own program
// can make others.
func (c *container) noteMounts() error {
	mounts, err := inspect.Mounts(c.Init.PID)
	if err != nil {
		return fmt.Errorf("read the mounts of container %s: %w", c.ID, err)
	}
	for _, m := range mounts {
		c.Mounts = append(c.Mounts, inspect.NewPoint(m))
	}
	device := inspect.MountedDevice(mounts, inspect.ShmDir)
	c.Shm = &device
	return nil
}

// shm is the device number of the container's /dev/shm, or 0.
func (c *container) shm() (uint64, error) {
	if c.Shm != nil {
		return *c.Shm, nil
	}
	mounts, err := inspect.Mounts(c.Init.PID)
	if err != nil {
		return 0, fmt.Errorf("read the mounts of container %s: %w", c.ID, err)
	}
	return inspect.MountedDevice(inspect.Given(mounts, c.Mounts), inspect.ShmDir), nil
}

// openShm opens the container's /dev/shm as a process sees it, or returns nil
// where the container was created without.
func (c *container) openShm(pid int) (*os.File, error) {
	device, err := c.shm()
	if err != nil || device == 0 {
		return nil, err
	}
	tree, err := inspect.Tree(pid, c.Mounts)
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	fd, err := tree.OpenMount(inspect.ShmDir, device)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), inspect.ShmDir), nil
}

// root is the first of the container's own processes.
func (c *container) root() process {
	if c.Restored != nil {
		return *c.Restored
	}
	return c.Init
}

// tree is the cgroup with the container's own processes.
func (c *container) tree() string {
	if c.Restored != nil {
		return filepath.Join(c.Cgroup, restoredCgroup)
	}
	return c.Cgroup
}

// pids lists the container's own processes.
func (c *container) pids() ([]int, error) {
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil {
		return nil, fmt.Errorf("list the processes of the container: %w", err)
	}
	return pids, nil
}

// forgetCgroup removes a container's cgroup if the kata-agent has left it: the
// kata-agent tries once, and fails while a process is still exiting. The next
// container of this id would inherit it as it is, possibly frozen. A cgroup
// with processes is that next container's and is left alone.
func (c *container) forgetCgroup(ctx context.Context) error {
	if c.Init.alive() {
		return nil // still running
	}
	if err := cgroup.Remove(ctx, filepath.Join(c.Cgroup, restoredCgroup)); err != nil {
		return err
	}
	if pids, err := cgroup.Procs(c.Cgroup, true); err != nil || len(pids) > 0 {
		return nil //nolint:nilerr // gone, as it should be
	}
	return cgroup.Remove(ctx, c.Cgroup)
}

// validID is what Kata accepts as a container id, which becomes part of paths
// (src/libs/kata-sys-util/src/validate.rs).
var validID = lazyregexp.New(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

func checkID(id string) error {
	if !validID.MatchString(id) || len(id) > 255 {
		return errcode.BadAgentRequest.Errorf("container id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// kataContainers is where the kata-agent keeps its bundle of each container,
// with the final OCI spec (src/agent/src/rpc.rs, setup_bundle).
const kataContainers = "/run/kata-containers"

// find looks up a container that Kata has created and not started: init is its
// only process.
func find(id string) (*container, error) {
	path := filepath.Join(kataContainers, id, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, errcode.NotAdopted.Errorf("container %s is unknown to the kata-agent: %w", id, err)
	}
	var spec struct {
		Linux struct {
			CgroupsPath string `json:"cgroupsPath"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	dir, err := cgroup.Find(cgroup.Root, spec.Linux.CgroupsPath, id)
	if err != nil {
		return nil, err
	}
	pids, err := cgroup.Procs(dir, false)
	if err != nil {
		return nil, fmt.Errorf("list the processes of container %s: %w", id, err)
	}
	init, err := oldest(pids)
	if err != nil {
		return nil, errcode.ProcessExited.Errorf("container %s has no process: %w", id, err)
	}
	stdio, err := inspect.Stdio(init.PID)
	if err != nil {
		return nil, fmt.Errorf("stdio of container %s: %w", id, err)
	}
	return &container{ID: id, Init: init, Cgroup: dir, Stdio: stdio}, nil
}

// load reads the record of a container, whether or not it still runs.
func (a *Agent) load(id string) (*container, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	data, err := os.ReadFile(a.recordPath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errcode.NotAdopted.Errorf("container %s was not prepared for checkpoints when it started: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	c := &container{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("read the record of container %s: %w", id, err)
	}
	return c, nil
}

// running is load for a container whose root process must be alive.
func (a *Agent) running(id string) (*container, error) {
	c, err := a.load(id)
	if err != nil {
		return nil, err
	}
	if !c.root().alive() {
		return nil, errExited
	}
	return c, nil
}

// errExited is the failure of a call that needs a container's processes.
var errExited = errclass.Precondition(errcode.ProcessExited, "the container's process has exited")

// explain returns the error of an operation on a container's processes. Once
// their root has exited, that is what failed, whatever the error: each file of a
// process has its own way to fail then, and so has CRIU, whose log may have more.
func (c *container) explain(err error) error {
	if err == nil || c.root().alive() {
		return err
	}
	if dump, ok := errors.AsType[*criu.Error](err); ok {
		return errclass.Join(errExited, dump)
	}
	return errExited
}

// containers are all that have a record and whose root process is alive.
func (a *Agent) containers() ([]*container, error) {
	records, err := os.ReadDir(filepath.Dir(a.recordPath("")))
	if err != nil {
		return nil, err
	}
	var out []*container
	for _, r := range records {
		id, ok := strings.CutSuffix(r.Name(), ".json")
		if !ok {
			continue
		}
		c, err := a.running(id)
		if err != nil {
			continue // it has ended
		}
		out = append(out, c)
	}
	return out, nil
}

func (a *Agent) save(c *container) error {
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	tmp := a.recordPath(c.ID) + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, a.recordPath(c.ID))
}

func (a *Agent) recordPath(id string) string {
	return filepath.Join(a.dir, "containers", id+".json")
}
