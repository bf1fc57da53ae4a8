// SPDX-License-Identifier: Apache-2.0

// Package cri drives containerd through the Container Runtime Interface as the
// kubelet does: pods, their containers, logs, execs and checkpoints. The pod
// scenarios call it.
//
// It knows nothing about the runtime except its handler's name.
package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client talks to one containerd.
type Client struct {
	runtime cri.RuntimeServiceClient
	conn    *grpc.ClientConn
	// handler is the handler of the pods' RuntimeClass.
	handler string
	// logs is the directory of the pods' log directories.
	logs string
}

// Dial connects to containerd's socket. The caller closes the client.
func Dial(socket, handler, logs string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, fmt.Errorf("connect to the CRI: %w", err)
	}
	return &Client{runtime: cri.NewRuntimeServiceClient(conn), conn: conn, handler: handler, logs: logs}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Ready waits until the CRI serves, also after a restart of containerd.
func (c *Client) Ready(ctx context.Context) error {
	for {
		answer, err := c.runtime.Status(ctx, &cri.StatusRequest{})
		if err == nil {
			for _, condition := range answer.GetStatus().GetConditions() {
				// Other conditions report deprecations.
				if name := condition.GetType(); !condition.GetStatus() && (name == cri.RuntimeReady || name == cri.NetworkReady) {
					err = fmt.Errorf("%s: %s", condition.GetType(), condition.GetMessage())
				}
			}
		}
		if err == nil {
			return nil
		}
		if pause(ctx) != nil {
			return fmt.Errorf("wait for the CRI: %w", err)
		}
	}
}

// With returns a client whose pods have another runtime.
func (c *Client) With(handler string) *Client {
	other := *c
	other.handler = handler
	return &other
}

// PodSpec describes a pod to run.
type PodSpec struct {
	Name, Namespace, UID string
	Annotations          map[string]string
	// SharePIDs puts all containers into one PID namespace.
	SharePIDs bool
	// Hostname defaults to the pod's name.
	Hostname string
}

// Pod is a running pod.
type Pod struct {
	ID     string
	config *cri.PodSandboxConfig
	client *Client
}

// RunPod starts a pod without containers.
func (c *Client) RunPod(ctx context.Context, p PodSpec) (*Pod, error) {
	if p.Hostname == "" {
		p.Hostname = p.Name
	}
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: p.Name, Namespace: p.Namespace, Uid: p.UID},
		Hostname:     p.Hostname,
		LogDirectory: filepath.Join(c.logs, p.UID),
		DnsConfig:    &cri.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{p.Name + ".test"}},
		Annotations:  p.Annotations,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    "/kubepods-test",
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: p.namespaces()},
		},
	}
	pod := &Pod{config: config, client: c}
	if err := os.MkdirAll(config.LogDirectory, 0o755); err != nil {
		return nil, fmt.Errorf("run pod %s: %w", p.Name, err)
	}
	answer, err := c.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: c.handler})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", p.Name, err)
	}
	pod.ID = answer.GetPodSandboxId()
	return pod, nil
}

func (p PodSpec) namespaces() *cri.NamespaceOption {
	pid := cri.NamespaceMode_CONTAINER
	if p.SharePIDs {
		pid = cri.NamespaceMode_POD
	}
	return &cri.NamespaceOption{Pid: pid}
}

// Address returns the pod's IP address.
func (p *Pod) Address(ctx context.Context) (string, error) {
	answer, err := p.client.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		return "", fmt.Errorf("address of pod %s: %w", p.ID, err)
	}
	return answer.GetStatus().GetNetwork().GetIp(), nil
}

// Remove stops and removes the pod with all its containers. It is no error if
// the pod does not exist.
func (p *Pod) Remove(ctx context.Context) error {
	_, err := p.client.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.ID})
	if err == nil {
		_, err = p.client.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.ID})
	}
	if err != nil && status.Code(err) != codes.NotFound {
		return fmt.Errorf("remove pod %s: %w", p.ID, err)
	}
	return nil
}

// ContainerSpec describes a container to create in a pod.
type ContainerSpec struct {
	Name, Image string
	Args        []string
	Annotations map[string]string
	Mounts      []*cri.Mount
	// Capabilities are added to the default ones.
	Capabilities []string
	// ReadOnlyRoot: it cannot write to its root file system.
	ReadOnlyRoot bool
	// Attempt is the number of earlier containers with this name in the pod.
	Attempt uint32
}

// Container is a container of a pod.
type Container struct {
	ID   string
	Name string
	log  string
	pod  *Pod
}

// Create creates a container without starting it.
func (p *Pod) Create(ctx context.Context, c ContainerSpec) (*Container, error) {
	log := fmt.Sprintf("%s-%d.log", c.Name, c.Attempt)
	// The kubelet pulls images and passes their ids, together with the name
	// that the user specified.
	config := &cri.ContainerConfig{
		Metadata:    &cri.ContainerMetadata{Name: c.Name, Attempt: c.Attempt},
		Image:       &cri.ImageSpec{Image: c.Image, UserSpecifiedImage: c.Image},
		Args:        c.Args,
		Annotations: c.Annotations,
		Mounts:      c.Mounts,
		LogPath:     log,
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: p.config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
			Capabilities:     &cri.Capability{AddCapabilities: c.Capabilities},
			ReadonlyRootfs:   c.ReadOnlyRoot,
		}},
	}
	answer, err := p.client.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: config, SandboxConfig: p.config})
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.Name, err)
	}
	return &Container{ID: answer.GetContainerId(), Name: c.Name, log: filepath.Join(p.config.GetLogDirectory(), log), pod: p}, nil
}

// Run creates a container and starts it. If it fails to start, it is removed.
func (p *Pod) Run(ctx context.Context, c ContainerSpec) (*Container, error) {
	container, err := p.Create(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := container.Start(ctx); err != nil {
		return nil, errors.Join(err, container.Remove(ctx))
	}
	return container, nil
}

// Start starts the container.
func (c *Container) Start(ctx context.Context) error {
	if _, err := c.client().StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID}); err != nil {
		return fmt.Errorf("start container %s: %w", c.Name, err)
	}
	return nil
}

func (c *Container) client() cri.RuntimeServiceClient { return c.pod.client.runtime }

// Pod returns the container's pod.
func (c *Container) Pod() *Pod { return c.pod }

// Status returns the container's status.
func (c *Container) Status(ctx context.Context) (*cri.ContainerStatus, error) {
	answer, err := c.client().ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		return nil, fmt.Errorf("status of container %s: %w", c.Name, err)
	}
	return answer.GetStatus(), nil
}

// Ended waits until the container has exited and returns its exit code.
func (c *Container) Ended(ctx context.Context) (int32, error) {
	for {
		s, err := c.Status(ctx)
		if err != nil {
			return 0, err
		}
		if s.GetState() == cri.ContainerState_CONTAINER_EXITED {
			return s.GetExitCode(), nil
		}
		if err := pause(ctx); err != nil {
			return 0, fmt.Errorf("wait for container %s to exit: %w", c.Name, err)
		}
	}
}

// Stats returns the container's statistics.
func (c *Container) Stats(ctx context.Context) (*cri.ContainerStats, error) {
	answer, err := c.client().ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: c.ID})
	if err != nil {
		return nil, fmt.Errorf("stats of container %s: %w", c.Name, err)
	}
	return answer.GetStats(), nil
}

// Exec runs a command in the container and returns its stdout. An exit status
// other than 0 is an error.
func (c *Container) Exec(ctx context.Context, command ...string) (string, error) {
	answer, err := c.client().ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: command, Timeout: 60})
	if err != nil {
		return "", fmt.Errorf("exec in container %s: %w", c.Name, err)
	}
	if answer.GetExitCode() != 0 {
		return "", fmt.Errorf("exec in container %s: status %d: %s%s", c.Name, answer.GetExitCode(), answer.GetStdout(), answer.GetStderr())
	}
	return string(answer.GetStdout()), nil
}

// Checkpoint writes an archive of the container to a file.
func (c *Container) Checkpoint(ctx context.Context, archive string) error {
	_, err := c.client().CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: archive})
	if err != nil {
		return fmt.Errorf("checkpoint container %s: %w", c.Name, err)
	}
	return nil
}

// Stop stops the container, with SIGKILL after a grace period in seconds.
func (c *Container) Stop(ctx context.Context, grace int64) error {
	if _, err := c.client().StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: grace}); err != nil {
		return fmt.Errorf("stop container %s: %w", c.Name, err)
	}
	return nil
}

// Remove removes the container, stopping it first if it runs.
func (c *Container) Remove(ctx context.Context) error {
	if _, err := c.client().RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		return fmt.Errorf("remove container %s: %w", c.Name, err)
	}
	return nil
}

// Lines returns the container's stdout, from its log.
func (c *Container) Lines() ([]string, error) {
	data, err := os.ReadFile(c.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("log of container %s: %w", c.Name, err)
	}
	return ParseLog(string(data))
}

// ParseLog returns the stdout lines of a log in the CRI's format: TIME STREAM
// TAG TEXT, with tag F for a whole line and P for a part. An incomplete last
// line is left out.
func ParseLog(text string) ([]string, error) {
	var lines []string
	part := ""
	for line := range strings.Lines(text) {
		line, whole := strings.CutSuffix(line, "\n")
		if !whole {
			break
		}
		fields := strings.SplitN(line, " ", 4)
		if len(fields) != 4 {
			return nil, fmt.Errorf("not a log line: %q", line)
		}
		if fields[1] != "stdout" {
			continue
		}
		part += fields[3]
		if fields[2] == "F" {
			lines = append(lines, part)
			part = ""
		}
	}
	return lines, nil
}

// Wait waits until enough accepts the container's output.
func (c *Container) Wait(ctx context.Context, enough func(lines []string) (bool, error)) error {
	for {
		lines, err := c.Lines()
		if err != nil {
			return err
		}
		if done, err := enough(lines); done || err != nil {
			return err
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("wait for the output of container %s, which has printed %q: %w", c.Name, lines[max(0, len(lines)-3):], err)
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(20 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
