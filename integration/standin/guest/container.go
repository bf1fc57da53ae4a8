// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	runcRoot = "/run/runc"
	// leaksOfInit is how many copies of its terminal Kata's agent leaks to an
	// init.
	leaksOfInit = 2
)

// container is a container of the sandbox. Its methods are called under the
// sandbox's lock.
type container struct {
	id     string
	bundle string
	cgroup cgroup
	spec   *specs.Spec
	hooks  []string // directories with the guest's own hooks, none if they are skipped
	reaper *reaper
	self   string
	state  specs.State
	init   *process
	pinned []*os.File // init's namespaces, by execNamespaces
}

// create writes the bundle and lets runc create the container, whose init waits
// for its start.
func (c *container) create(fit surroundings) (err error) {
	source, terminal := c.spec.Root.Path, c.spec.Process.Terminal
	hidden := concealed{c.spec.Linux.MaskedPaths, c.spec.Linux.ReadonlyPaths}
	finish(c.spec, fit)
	rootfs := filepath.Join(c.bundle, "rootfs")
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, rootfs, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the root %s: %w", source, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.destroy())
		}
	}()
	return c.createWith(terminal, hidden)
}

func (c *container) createWith(terminal bool, hidden concealed) error {
	// The containers' network is the guest's own, and so are its settings: runc
	// accepts them only for a namespace of the container's.
	if err := setSysctls("/proc/sys", c.spec.Linux.Sysctl, "net."); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(c.spec, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.bundle, "config.json"), raw, 0o600); err != nil {
		return err
	}
	ours, other, err := newStreams(terminal, leaksOfInit)
	if err != nil {
		return err
	}
	defer other.close()
	c.init = &process{streams: ours}
	if err := c.runcCreate(other); err != nil {
		ours.close()
		c.init = nil
		return err
	}
	c.state.Pid = c.init.pid
	if terminal {
		if err := c.helper(TerminalMode, strconv.Itoa(c.init.pid)); err != nil {
			return err
		}
	}
	if err := c.finishMounts(hidden); err != nil {
		return err
	}
	for _, ns := range execNamespaces {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", c.init.pid, ns.name))
		if err != nil {
			return fmt.Errorf("open the %s namespace: %w", ns.name, err)
		}
		c.pinned = append(c.pinned, f)
	}
	return nil
}

func (c *container) runcCreate(t *theirs) error {
	pidFile, logFile := filepath.Join(c.bundle, "pid"), filepath.Join(c.bundle, "runc.log")
	defer os.Remove(pidFile)
	defer os.Remove(logFile)
	args := []string{"--log", logFile, "create", "--bundle", c.bundle, "--pid-file", pidFile, "--preserve-fds", strconv.Itoa(len(t.leaked))}
	if inInitramfs() {
		args = append(args, "--no-pivot")
	}
	cmd := c.runc(append(args, c.id)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = t.stdio[0], t.stdio[1], t.stdio[2]
	cmd.ExtraFiles = t.leaked
	status, err := c.reaper.start(cmd)
	if err != nil {
		return fmt.Errorf("start runc: %w", err)
	}
	if code := <-status; code != 0 {
		text, _ := os.ReadFile(logFile)
		return fmt.Errorf("runc create: exit status %d: %s", code, bytes.TrimSpace(text))
	}
	raw, err := os.ReadFile(pidFile)
	if err != nil {
		return fmt.Errorf("runc create: %w", err)
	}
	if c.init.pid, err = strconv.Atoi(strings.TrimSpace(string(raw))); err != nil {
		return fmt.Errorf("runc create: pid: %w", err)
	}
	c.init.follow(c.reaper.watch(c.init.pid))
	return nil
}

func (c *container) runc(args ...string) *exec.Cmd {
	return exec.Command("runc", append([]string{"--root", runcRoot}, args...)...)
}

// helper runs the agent in one of its helper modes.
func (c *container) helper(args ...string) error {
	return c.reaper.runCommand(exec.Command(c.self, args...))
}

func (c *container) start() error {
	if err := c.reaper.runCommand(c.runc("start", c.id)); err != nil {
		return err
	}
	c.runHooks("poststart", specs.StateRunning)
	return nil
}

// update changes the limits.
func (c *container) update(resources []byte) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	_, err = write.Write(resources) // fits the pipe's buffer
	write.Close()
	if err != nil {
		return err
	}
	cmd := c.runc("update", "--resources", "-", c.id)
	cmd.Stdin = read
	return c.reaper.runCommand(cmd)
}

// runHooks runs the guest's own hooks of a kind that runc does not run.
func (c *container) runHooks(kind string, status specs.ContainerState) {
	for _, root := range c.hooks {
		for _, path := range findHooks(root, kind) {
			if err := c.runHook(path, status); err != nil {
				log.L.WithError(err).WithField("container", c.id).Error("guest hook failed")
			}
		}
	}
}

func (c *container) runHook(path string, status specs.ContainerState) error {
	raw, err := json.Marshal(c.state)
	if err != nil {
		return err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	_, err = write.Write(raw) // fits the pipe's buffer
	write.Close()
	if err != nil {
		return err
	}
	cmd := exec.Command(c.self, HookMode, annotateFlag, string(status), path)
	cmd.Stdin = read
	return c.reaper.runCommand(cmd)
}

// exec starts another process in the namespaces that init was created with. It
// blocks while the cgroup is frozen.
func (c *container) exec(p *specs.Process) (*process, error) {
	ours, other, err := newStreams(p.Terminal, 0)
	if err != nil {
		return nil, err
	}
	defer other.close()
	p.Capabilities = c.spec.Process.Capabilities
	request := execRequest{Cgroup: string(c.cgroup), Process: p, Terminal: p.Terminal}
	if c.spec.Linux != nil && c.spec.Linux.Seccomp != nil {
		request.Filtered = c.init.pid
	}
	pid, err := c.execHelper(other, request)
	if err != nil {
		ours.close()
		return nil, err
	}
	e := &process{pid: pid, streams: ours}
	e.follow(c.reaper.watch(pid))
	return e, nil
}

func (c *container) execHelper(t *theirs, r execRequest) (int, error) {
	raw, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}
	fd, err := unix.MemfdCreate("exec", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, err
	}
	request := os.NewFile(uintptr(fd), "request")
	defer request.Close()
	if _, err := request.Write(raw); err != nil {
		return 0, err
	}
	if _, err := request.Seek(0, 0); err != nil {
		return 0, err
	}
	result, write, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer result.Close()
	cmd := exec.Command(c.self, ExecMode)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = t.stdio[0], t.stdio[1], t.stdio[2]
	cmd.ExtraFiles = append([]*os.File{request, write}, c.pinned...)
	status, err := c.reaper.start(cmd)
	write.Close()
	if err != nil {
		return 0, err
	}
	var answer execResult
	err = json.NewDecoder(result).Decode(&answer)
	code := <-status
	if answer.Error != "" {
		return 0, errors.New(answer.Error)
	}
	if err != nil {
		return 0, fmt.Errorf("the helper exited with status %d: %w", code, err)
	}
	return answer.Pid, nil
}

// destroy kills what is left of the container and removes its directory.
func (c *container) destroy() error {
	for _, f := range c.pinned {
		f.Close()
	}
	var failures []error
	if c.init != nil {
		c.runHooks("poststop", specs.StateStopped)
		if err := c.reaper.runCommand(c.runc("delete", "--force", c.id)); err != nil {
			failures = append(failures, err)
		}
	}
	if err := c.cgroup.remove(); err != nil {
		failures = append(failures, err)
	}
	// Nothing is removed through a remaining mount.
	if err := unix.Unmount(filepath.Join(c.bundle, "rootfs"), unix.MNT_DETACH); err != nil && err != unix.EINVAL {
		return errors.Join(append(failures, fmt.Errorf("unmount the root: %w", err))...)
	}
	if err := os.RemoveAll(c.bundle); err != nil {
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}
