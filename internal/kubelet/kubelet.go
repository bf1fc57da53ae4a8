// SPDX-License-Identifier: Apache-2.0

// Package kubelet checkpoints the containers of a pod by the checkpoint API of
// the kubelet on the pod's node, by way of the API server's proxy to nodes:
// with the credentials of a kubeconfig, and without access to the node.
//
// Written against Kubernetes 1.37 (the feature gate ContainerCheckpoint).
package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// maxAnswer bounds an answer of the API server, in bytes.
const maxAnswer = 16 << 20

// Cluster is an API server.
type Cluster struct {
	// Namespace is the one that the user means.
	Namespace string
	base      *url.URL
	client    *http.Client
}

// Options say which cluster is meant; empty ones are kubectl's defaults.
type Options struct{ Kubeconfig, Context, Namespace string }

// Connect reads the kubeconfig. It does not talk to the API server.
func Connect(o Options) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = o.Kubeconfig
	overrides := &clientcmd.ConfigOverrides{CurrentContext: o.Context}
	overrides.Context.Namespace = o.Namespace
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides)
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, errcode.Kubeconfig.Errorf("kubeconfig: %w", err)
	}
	c := &Cluster{}
	if c.Namespace, _, err = loader.Namespace(); err != nil {
		return nil, errcode.Kubeconfig.Errorf("kubeconfig: %w", err)
	}
	if c.client, err = rest.HTTPClientFor(config); err != nil {
		return nil, errcode.Kubeconfig.Errorf("kubeconfig: %w", err)
	}
	if c.base, _, err = rest.DefaultServerUrlFor(config); err != nil {
		return nil, errcode.Kubeconfig.Errorf("kubeconfig: %w", err)
	}
	return c, nil
}

// Archive is a checkpoint on a node.
type Archive struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Container string `json:"container"`
	Node      string `json:"node"`
	// Path is that of the archive on the node.
	Path string `json:"path"`
	// Annotation and Value have a pod's container of the same name continue from
	// it, on this node.
	Annotation string `json:"annotation"`
	Value      string `json:"value"`
}

// Checkpoint checkpoints a container of a pod, or all of them one after the
// other. Each call of the kubelet may take as long as timeout. The error of one
// ends it; the archives that were made before are returned, too.
func (c *Cluster) Checkpoint(ctx context.Context, pod, container string, timeout time.Duration) (made []Archive, _ error) {
	for _, name := range []string{c.Namespace, pod, container} {
		if strings.Contains(name, "/") {
			return nil, errcode.Usage.Errorf("%q is not a name: give the namespace with --namespace", name)
		}
	}
	var p struct {
		Spec struct {
			NodeName   string
			Containers []struct{ Name string }
		}
		Status struct{ Phase string }
	}
	if err := c.call(ctx, http.MethodGet, path.Join("/api/v1/namespaces", c.Namespace, "pods", pod), nil, &p); err != nil {
		return nil, errcode.NoPod.Errorf("pod %s/%s: %w", c.Namespace, pod, err)
	}
	if p.Spec.NodeName == "" || p.Status.Phase != "Running" {
		return nil, errcode.NoPod.Errorf("pod %s/%s is %s, and only one that runs can be checkpointed", c.Namespace, pod, strings.ToLower(text.Line(p.Status.Phase, text.MaxName)))
	}
	var names []string
	for _, k := range p.Spec.Containers {
		if container == "" || k.Name == container {
			names = append(names, k.Name)
		}
	}
	if len(names) == 0 {
		return nil, errcode.NoPod.Errorf("pod %s/%s has no container %s", c.Namespace, pod, container)
	}
	for _, name := range names {
		var answer struct{ Items []string }
		query := url.Values{"timeout": {strconv.FormatInt(int64(timeout.Seconds()), 10)}}
		err := c.call(ctx, http.MethodPost, path.Join("/api/v1/nodes", p.Spec.NodeName, "proxy/checkpoint", c.Namespace, pod, name), query, &answer)
		if err == nil && len(answer.Items) == 0 {
			err = errors.New("the kubelet names no archive")
		}
		if err != nil {
			return made, errcode.Kubelet.Errorf("checkpoint container %s of pod %s/%s on node %s: %w", name, c.Namespace, pod, p.Spec.NodeName, explain(err))
		}
		for _, archive := range answer.Items {
			archive = text.Line(archive, text.MaxError)
			made = append(made, Archive{c.Namespace, pod, name, p.Spec.NodeName, archive, annotations.RestorePrefix + name, path.Base(archive)})
		}
	}
	return made, nil
}

// statusError is an answer that is an error.
type statusError struct {
	code    int
	message string
}

// Error implements error.
func (e *statusError) Error() string { return e.message }

// explain adds what to do to errors of the kubelet's checkpoint API.
func explain(err error) error {
	status := new(statusError)
	if !errors.As(err, &status) {
		return err
	}
	switch status.code {
	case http.StatusForbidden:
		return fmt.Errorf("%w: you need the verb create on nodes/proxy", err)
	case http.StatusNotFound:
		return fmt.Errorf("%w: the kubelet serves checkpoints with the feature gate ContainerCheckpoint only (the default since 1.30), and if its runtime does", err)
	}
	return err
}

// call calls the API server and decodes its answer.
func (c *Cluster) call(ctx context.Context, method, name string, query url.Values, into any) error {
	u := *c.base
	u.Path = path.Join(u.Path, name)
	u.RawQuery = query.Encode()
	r, err := http.NewRequestWithContext(ctx, method, u.String(), http.NoBody)
	if err != nil {
		return err
	}
	resp, err := c.client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode == http.StatusOK {
		return json.Unmarshal(data, into)
	}
	// The API server's own errors are objects, those of a kubelet are text.
	var status struct{ Message string }
	message := strings.TrimSpace(string(data))
	if json.Unmarshal(data, &status) == nil && status.Message != "" {
		message = status.Message
	}
	if message == "" {
		message = resp.Status
	}
	return &statusError{resp.StatusCode, text.Line(message, text.MaxError)}
}
