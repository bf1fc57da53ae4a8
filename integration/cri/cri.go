// Package cri drives containerd by the Container Runtime Interface as the kubelet does: pods, the containers in them, their logs, execs and
// checkpoints. The scenarios of pods call it.
//
// It knows nothing of the runtime below but its handler's name.
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
	// handler is that of the pods' RuntimeClass.
	handler string
	// logs is the directory for the pods' logs, one below it for each pod.
	logs string
}

// Dial connects to containerd's socket. Closing the client is the caller's.
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

// Ready waits until the CRI serves, for the first time or after containerd was started again.
func (c *Client) Ready(ctx context.Context) error {
	for {
		answer, err := c.runtime.Status(ctx, &cri.StatusRequest{})
		if err == nil {
			for _, condition := range answer.GetStatus().GetConditions() {
				// There are others, which are about deprecations.
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

// With gives a client whose pods are of another runtime.
func (c *Client) With(handler string) *Client {
	other := *c
	other.handler = handler
	return &other
}

// PodSpec says what pod to run.
type PodSpec struct {
	Name, Namespace, UID string
	Annotations          map[string]string
	// SharePIDs: all containers are in one pid namespace.
	SharePIDs bool
	// Hostname is the pod's name where none is given.
	Hostname string
}

// Pod is one that runs.
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

// Address is the pod's.
func (p *Pod) Address(ctx context.Context) (string, error) {
	answer, err := p.client.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		return "", fmt.Errorf("address of pod %s: %w", p.ID, err)
	}
	return answer.GetStatus().GetNetwork().GetIp(), nil
}

// Remove ends the pod and all its containers. One that does not exist is no error.
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

// ContainerSpec says what container to create in a pod.
type ContainerSpec struct {
	Name, Image string
	Args        []string
	Annotations map[string]string
	Mounts      []*cri.Mount
	// Capabilities are added to those that every container has.
	Capabilities []string
	// Attempt counts the containers of the name that there have been in the pod before.
	Attempt uint32
}

// Container is one of a pod.
type Container struct {
	ID   string
	Name string
	log  string
	pod  *Pod
}

// Create makes a container. Nothing runs yet.
func (p *Pod) Create(ctx context.Context, c ContainerSpec) (*Container, error) {
	log := fmt.Sprintf("%s-%d.log", c.Name, c.Attempt)
	// The kubelet pulls images and gives their ids; what it was told to pull travels along.
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
		}},
	}
	answer, err := p.client.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: config, SandboxConfig: p.config})
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.Name, err)
	}
	return &Container{ID: answer.GetContainerId(), Name: c.Name, log: filepath.Join(p.config.GetLogDirectory(), log), pod: p}, nil
}

// Run makes a container and starts it. One that fails to start is removed.
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

// Pod is the container's.
func (c *Container) Pod() *Pod { return c.pod }

// Status is what the CRI says of the container.
func (c *Container) Status(ctx context.Context) (*cri.ContainerStatus, error) {
	answer, err := c.client().ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		return nil, fmt.Errorf("status of container %s: %w", c.Name, err)
	}
	return answer.GetStatus(), nil
}

// Ended waits until the container has ended and gives its exit code.
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
			return 0, fmt.Errorf("wait for the end of container %s: %w", c.Name, err)
		}
	}
}

// Stats are the container's.
func (c *Container) Stats(ctx context.Context) (*cri.ContainerStats, error) {
	answer, err := c.client().ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: c.ID})
	if err != nil {
		return nil, fmt.Errorf("stats of container %s: %w", c.Name, err)
	}
	return answer.GetStats(), nil
}

// Exec runs a command in the container and gives what it printed to stdout. A status other than 0 is an error.
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

// Stop ends the container, by SIGKILL once the grace period of so many seconds is over.
func (c *Container) Stop(ctx context.Context, grace int64) error {
	if _, err := c.client().StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: grace}); err != nil {
		return fmt.Errorf("stop container %s: %w", c.Name, err)
	}
	return nil
}

// Remove ends the container, if it runs, and removes it.
func (c *Container) Remove(ctx context.Context) error {
	if _, err := c.client().RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		return fmt.Errorf("remove container %s: %w", c.Name, err)
	}
	return nil
}

// Lines is what the container has printed to stdout, by its log.
func (c *Container) Lines() ([]string, error) {
	data, err := os.ReadFile(c.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("log of container %s: %w", c.Name, err)
	}
	return ParseLog(string(data))
}

// ParseLog takes the CRI's log format apart: TIME STREAM TAG TEXT, the tag F for the end of a line, P for a part of one. A line that is just
// being written is left out.
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
			return nil, fmt.Errorf("no line of a log: %q", line)
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

// Wait waits until what the container has printed is enough.
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
