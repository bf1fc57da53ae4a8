// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"strings"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/typeurl/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// The files below are what containerd's CRI puts into its archives (containerd
// 2.3, internal/cri/server/container_checkpoint_linux.go), and what podman,
// CRI-O and checkpointctl read of them (checkpointctl/lib 1.7).

// configDump is config.dump.
type configDump struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	RootfsImage     string    `json:"rootfsImage,omitempty"`
	RootfsImageRef  string    `json:"rootfsImageRef,omitempty"`
	RootfsImageName string    `json:"rootfsImageName,omitempty"`
	Runtime         string    `json:"runtime,omitempty"`
	Created         time.Time `json:"createdTime"`
	Checkpointed    time.Time `json:"checkpointedTime"`
	RestoredTime    time.Time `json:"restoredTime"`
	Restored        bool      `json:"restored"`
}

// statusDump is status.dump: the CRI's ContainerStatus.
type statusDump struct {
	ID       string `json:"id"`
	Metadata struct {
		Name    string `json:"name"`
		Attempt uint32 `json:"attempt,omitempty"`
	} `json:"metadata"`
	// State 1 is CONTAINER_RUNNING.
	State     int32 `json:"state"`
	CreatedAt int64 `json:"created_at"`
	Image     struct {
		Image string `json:"image"`
	} `json:"image"`
	ImageRef    string            `json:"image_ref"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// image is the name of the container's image, "" where nobody knows it.
func (c *Container) image() string {
	if c.info.Image != "" && !strings.HasPrefix(c.info.Image, "sha256:") {
		return c.info.Image
	}
	if name := annotations.ImageName(c.spec.Annotations); name != "" {
		return name
	}
	return c.info.Image
}

const nameAnnotation = "io.kubernetes.cri.container-name"

// describe writes the files that other tools read.
func (j *job) describe() error {
	name := j.Name
	if name == "" {
		name = j.ID
	}
	config := &configDump{
		ID: j.ID, Name: name, RootfsImage: j.image(), RootfsImageRef: j.info.Image, RootfsImageName: j.image(), Runtime: j.info.Runtime.Name,
		Created: j.info.CreatedAt, Checkpointed: j.out.Created,
	}
	status := &statusDump{ID: j.ID, State: 1, CreatedAt: j.info.CreatedAt.UnixNano(), ImageRef: j.info.Image, Annotations: criAnnotations(j.spec.Annotations), Labels: criLabels(j.info.Labels)}
	status.Metadata.Name, status.Image.Image = name, j.image()
	spec := *j.spec
	if j.Pod == nil {
		// By this annotation checkpointctl names a container of containerd's.
		spec.Annotations = maps.Clone(spec.Annotations)
		if spec.Annotations == nil {
			spec.Annotations = map[string]string{}
		}
		spec.Annotations[nameAnnotation] = name
	}
	for file, v := range map[string]any{store.ConfigName: config, store.StatusName: status, store.SpecName: &spec} {
		data, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(j.draft.File(file), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// criAnnotations are those that the CRI knows a container by, without its own.
func criAnnotations(all map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range all {
		if !strings.HasPrefix(k, "io.kubernetes.cri") && !strings.HasPrefix(k, annotations.Prefix) {
			out[k] = v
		}
	}
	return out
}

// criLabels are a container's labels without containerd's own.
func criLabels(all map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range all {
		if !strings.HasPrefix(k, "io.cri-containerd") && !strings.HasPrefix(k, "containerd.io/") {
			out[k] = v
		}
	}
	return out
}

// estimate is about how large the image set is going to be, in bytes, 0 if
// unknown.
func (j *job) estimate(ctx context.Context) int64 {
	m, err := j.task.Metrics(j.in(ctx))
	if err != nil {
		return 0
	}
	return Memory(m.GetData())
}

// Memory is the memory of a container that an image set contains, by its
// metrics: what is not a cache of files. It is 0 if they do not have it.
func Memory(data typeurl.Any) int64 {
	v, err := typeurl.UnmarshalAny(data)
	if err != nil {
		return 0
	}
	switch m := v.(type) {
	case *cgroup2.Metrics:
		return int64(m.GetMemory().GetAnon() + m.GetMemory().GetShmem()) //nolint:gosec // a guest that lies spoils a bar
	case *cgroup1.Metrics:
		return int64(m.GetMemory().GetTotalRSS()) //nolint:gosec // see above
	}
	return 0
}
