// SPDX-License-Identifier: Apache-2.0

// Package engine checkpoints and restores the containers of all engines that
// use containerd, for the command kata-checkpoint: those of ctr, nerdctl,
// Docker and the CRI. It finds a container by the name that its engine has for
// it, and uses containerd's task API, below the engines: what is checkpointed
// has the options that the user asks for, which no engine passes on.
//
// A restore is the engine's where only the engine can do it: Docker's through
// its API, and that of a pod's container by a pod with an annotation.
//
// Written against containerd 2.4, nerdctl 2.3 and Docker 29.
package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// Runtime is the name of our runtime.
const Runtime = "io.containerd.kata-checkpoint.v2"

// Kind is whose container it is.
type Kind string

// Kinds of engines.
const (
	Containerd Kind = "containerd" // ctr, and other clients
	Nerdctl    Kind = "nerdctl"
	Docker     Kind = "docker"
	CRI        Kind = "cri"
)

// dockerNamespace is containerd's namespace of Docker's containers.
const dockerNamespace = "moby"

// Node is a node's containerd, and its other engines.
type Node struct {
	Config *config.Config
	// DockerSocket is that of Docker's API.
	DockerSocket string
	// Guard, if it is set, sees to it that a container is resumed if this process
	// is killed before it calls release.
	Guard   func(namespace, id string) (release func(), err error)
	address string
	client  *client.Client
}

// Dial connects to containerd. The caller closes the node.
func Dial(cfg *config.Config, address, docker string) (*Node, error) {
	c, err := client.New(address)
	if err != nil {
		return nil, errcode.NoEngine.Errorf("connect to containerd at %s: %w: name its socket with --address, and run this as root", address, err)
	}
	return &Node{Config: cfg, DockerSocket: docker, address: address, client: c}, nil
}

// listens is an error where containerd has no socket, for which the client would
// wait.
func (n *Node) listens() error {
	if _, err := os.Stat(n.address); err != nil {
		return errcode.NoEngine.Errorf("containerd does not run: %w: start it, or name its socket with --address", err)
	}
	return nil
}

// Close ends the connection.
func (n *Node) Close() error { return n.client.Close() }

// Container is a container that was found.
type Container struct {
	node      *Node
	Namespace string
	ID        string
	// Name is the engine's, "" where it has none but the ID.
	Name string
	Kind Kind
	// Pod is nil for containers without one.
	Pod   *store.Pod
	place annotations.Kind
	info  containers.Container
	spec  *specs.Spec
	c     client.Container
}

// in is the context for calls about the container.
func (c *Container) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, c.Namespace)
}

func (c *Container) String() string {
	name := c.ID
	if c.Pod != nil {
		name = c.Pod.Namespace + "/" + c.Pod.Name + "/" + c.Name
	} else if c.Name != "" {
		name = c.Name
	}
	return fmt.Sprintf("%s (namespace %s)", name, c.Namespace)
}

// Find returns the container with an ID, a name or the beginning of an ID, in a
// namespace of containerd or, if that is empty, in any. A container of a pod
// may also be called POD/CONTAINER or NAMESPACE/POD/CONTAINER.
func (n *Node) Find(ctx context.Context, namespace, ref string) (*Container, error) {
	if ref == "" {
		return nil, errcode.Usage.Wrap(errors.New("a container is needed: its name, its ID or the beginning of that"))
	}
	all, err := n.list(ctx, namespace)
	if err != nil {
		return nil, err
	}
	found, err := match(all, ref)
	if found == nil && err == nil && (namespace == "" || namespace == dockerNamespace) {
		if id, name, derr := n.dockerContainer(ctx, ref); derr == nil {
			if found, err = match(all, id); found != nil {
				found.Name = name
			}
		}
	}
	if err != nil {
		return nil, err
	}
	if found == nil {
		where := "any namespace of containerd"
		if namespace != "" {
			where = "containerd's namespace " + namespace
		}
		return nil, errcode.NoContainer.Errorf("no container in %s has the name or ID %s: ctr -n NAMESPACE container ls, nerdctl ps -a and crictl ps list them", where, ref)
	}
	return found, nil
}

// match returns the one container that a user may mean, nil if there is none.
func match(all []*Container, ref string) (*Container, error) {
	for _, fits := range []func(*Container) bool{
		func(c *Container) bool { return c.ID == ref },
		func(c *Container) bool { return c.calledBy(ref) },
		func(c *Container) bool { return strings.HasPrefix(c.ID, ref) },
	} {
		var found []*Container
		for _, c := range all {
			if fits(c) && (c.place != annotations.Sandbox || c.ID == ref) {
				found = append(found, c)
			}
		}
		if len(found) == 1 {
			return found[0], nil
		}
		if len(found) > 1 {
			var list []string
			for _, c := range found {
				list = append(list, fmt.Sprintf("%s in %s (ID %s)", c, c.Kind, c.ID))
			}
			return nil, errcode.Ambiguous.Errorf("several containers are called %s: %s: use the ID, or --namespace", ref, strings.Join(list, ", "))
		}
	}
	return nil, nil //nolint:nilnil // there is none
}

func (c *Container) calledBy(ref string) bool {
	if c.Name == "" {
		return false
	}
	if c.Pod != nil && strings.Contains(ref, "/") {
		return ref == c.Pod.Name+"/"+c.Name || ref == c.Pod.Namespace+"/"+c.Pod.Name+"/"+c.Name
	}
	return ref == c.Name
}

// list returns all containers, sandboxes included.
func (n *Node) list(ctx context.Context, namespace string) ([]*Container, error) {
	if err := n.listens(); err != nil {
		return nil, err
	}
	spaces := []string{namespace}
	if namespace == "" {
		var err error
		if spaces, err = n.client.NamespaceService().List(ctx); err != nil {
			return nil, errcode.NoEngine.Errorf("list containerd's namespaces: %w", err)
		}
		slices.Sort(spaces)
	}
	var out []*Container
	for _, space := range spaces {
		in := namespaces.WithNamespace(ctx, space)
		list, err := n.client.Containers(in)
		if err != nil {
			return nil, errcode.NoEngine.Errorf("list the containers in containerd's namespace %s: %w", space, err)
		}
		for _, c := range list {
			info, err := c.Info(in, client.WithoutRefreshedMetadata)
			if err != nil {
				return nil, errcode.NoEngine.Errorf("list the containers in containerd's namespace %s: %w", space, err)
			}
			if found := n.describe(space, c, info); found != nil {
				out = append(out, found)
			}
		}
	}
	return out, nil
}

// describe returns what is known of a container, nil if that cannot be read.
func (n *Node) describe(namespace string, c client.Container, info containers.Container) *Container {
	out := &Container{node: n, Namespace: namespace, ID: info.ID, Kind: Containerd, info: info, c: c, spec: &specs.Spec{}}
	if v, err := typeurl.UnmarshalAny(info.Spec); err == nil {
		if spec, ok := v.(*specs.Spec); ok {
			out.spec = spec
		}
	}
	a := out.spec.Annotations
	place, sandbox, err := annotations.Place(info.ID, a)
	if err != nil {
		return nil
	}
	out.place = place
	switch {
	case annotations.MadeByCRI(a):
		out.Kind, out.Name = CRI, annotations.ContainerName(a)
		out.Pod = &store.Pod{Namespace: annotations.PodNamespace(a), Name: annotations.PodName(a), UID: annotations.PodUID(a), Sandbox: sandbox}
	case namespace == dockerNamespace:
		out.Kind = Docker
	case info.Labels["nerdctl/name"] != "":
		out.Kind, out.Name = Nerdctl, info.Labels["nerdctl/name"]
	}
	return out
}

// checkable refuses containers that cannot be checkpointed at all.
func (c *Container) checkable() error {
	switch {
	case c.place == annotations.Sandbox:
		return errcode.NoWorkload.Errorf("container %s is the sandbox of pod %s/%s, without a workload: name one of the pod's containers, or use kata-checkpoint pod", c.ID, c.Pod.Namespace, c.Pod.Name)
	case c.info.Runtime.Name != Runtime:
		return errcode.OtherRuntime.Errorf("container %s runs with the runtime %s, and only those of %s can be checkpointed: create it again with that runtime", c, c.info.Runtime.Name, Runtime)
	}
	return nil
}

// Pod returns the containers of a pod: by the pod's name, NAMESPACE/NAME, or
// the ID of its sandbox or the beginning of that.
func (n *Node) Pod(ctx context.Context, ref string) ([]*Container, error) {
	all, err := n.list(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, fits := range []func(*Container) bool{
		func(c *Container) bool { return ref == c.Pod.Name || ref == c.Pod.Namespace+"/"+c.Pod.Name },
		func(c *Container) bool { return strings.HasPrefix(c.Pod.Sandbox, ref) },
	} {
		var found []*Container
		sandboxes := map[string]string{}
		for _, c := range all {
			if c.Pod == nil || !fits(c) {
				continue
			}
			sandboxes[c.Pod.Sandbox] = c.Pod.Namespace + "/" + c.Pod.Name
			if c.place == annotations.InPod {
				found = append(found, c)
			}
		}
		if len(sandboxes) > 1 {
			var list []string
			for id, name := range sandboxes {
				list = append(list, name+" (sandbox "+id+")")
			}
			slices.Sort(list)
			return nil, errcode.Ambiguous.Errorf("several pods are called %s: %s: use NAMESPACE/NAME or the sandbox's ID", ref, strings.Join(list, ", "))
		}
		if len(found) > 0 {
			slices.SortFunc(found, func(a, b *Container) int { return strings.Compare(a.Name, b.Name) })
			return found, nil
		}
		if len(sandboxes) == 1 {
			return nil, errcode.NoContainer.Errorf("pod %s has no containers", ref)
		}
	}
	return nil, errcode.NoContainer.Errorf("no pod on this node is called %s: crictl pods lists them", ref)
}
