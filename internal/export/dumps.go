// SPDX-License-Identifier: Apache-2.0

package export

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// checkFiles compares the files beside the image set with the record that came
// with them, and removes that: another one is written.
func checkFiles(draft *store.Draft, r *store.Record) error {
	c := &store.Checkpoint{Record: r, Path: draft.Path()}
	if err := c.Check(context.Background(), func(int64) {}); err != nil {
		return err
	}
	return os.Remove(draft.File(store.RecordName))
}

// fromDumps fills in a record from the files of an archive that the CRI has
// written. They inform a reader, and may be missing.
func fromDumps(draft *store.Draft, r *store.Record) {
	var config struct {
		Name            string `json:"name"`
		RootfsImageName string `json:"rootfsImageName"`
		Runtime         string `json:"runtime"`
	}
	if data, err := os.ReadFile(draft.File(store.ConfigName)); err == nil {
		_ = json.Unmarshal(data, &config) // then nothing is known
	}
	r.Engine, r.ContainerName, r.Image, r.Runtime = "containerd", config.Name, config.RootfsImageName, config.Runtime
	spec := &specs.Spec{}
	data, err := os.ReadFile(draft.File(store.SpecName))
	if err != nil || json.Unmarshal(data, spec) != nil {
		return
	}
	if a := spec.Annotations; annotations.MadeByCRI(a) {
		r.Engine, r.ContainerName = "cri", annotations.ContainerName(a)
		r.Pod = &store.Pod{Namespace: annotations.PodNamespace(a), Name: annotations.PodName(a), UID: annotations.PodUID(a)}
		if _, sandbox, err := annotations.Place(fmt.Sprintf("%p", spec), a); err == nil {
			r.Pod.Sandbox = sandbox
		}
	}
}
