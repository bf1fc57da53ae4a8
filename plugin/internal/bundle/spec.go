// SPDX-License-Identifier: Apache-2.0

// Package bundle reads and edits the OCI bundle that containerd has created for
// a container, and keeps our own records in its directory. Kata reads
// config.json in its Create, so what the shim changes before that takes effect.
//
// Written against containerd 2.4 and the OCI runtime spec 1.3.
package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

const specName = "config.json"

// Spec is a bundle's config.json. Whatever is not edited is written back
// unchanged, including fields of later versions of the OCI runtime spec.
type Spec struct {
	// Spec is read-only; the methods edit.
	*specs.Spec
	path string
	raw  map[string]json.RawMessage
}

// ReadSpec reads config.json of the bundle directory dir.
func ReadSpec(dir string) (*Spec, error) {
	s := &Spec{Spec: &specs.Spec{}, path: filepath.Join(dir, specName)}
	data, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("bundle %s has no %s", dir, specName)
	}
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	if err := json.Unmarshal(data, s.Spec); err != nil {
		return nil, fmt.Errorf("%s is not an OCI runtime spec: %w", s.path, err)
	}
	if err := json.Unmarshal(data, &s.raw); err != nil || s.raw == nil {
		return nil, fmt.Errorf("%s is not an OCI runtime spec: %w", s.path, errclass.Join(err, errors.New("no JSON object")))
	}
	return s, nil
}

// Adjust applies an adjustment. [Spec.Write] saves it.
func (s *Spec) Adjust(a *adjust.Adjustment) error {
	s.Annotations, s.Mounts = a.Apply(s.Annotations, s.Mounts)
	if len(a.Annotations) > 0 {
		if err := s.set("annotations", s.Annotations); err != nil {
			return err
		}
	}
	return s.appendMounts(a.Mounts)
}

// AddMount appends a mount.
func (s *Spec) AddMount(m specs.Mount) error {
	s.Mounts = append(s.Mounts, m)
	return s.appendMounts([]specs.Mount{m})
}

func (s *Spec) appendMounts(mounts []specs.Mount) error {
	if len(mounts) == 0 {
		return nil
	}
	var all []json.RawMessage
	if old, ok := s.raw["mounts"]; ok {
		if err := json.Unmarshal(old, &all); err != nil {
			return fmt.Errorf("edit %s: %w", s.path, err)
		}
	}
	for _, m := range mounts {
		data, err := marshal(m)
		if err != nil {
			return fmt.Errorf("edit %s: %w", s.path, err)
		}
		all = append(all, data)
	}
	return s.set("mounts", all)
}

// SetProcess replaces fields of the process, by their JSON names. A nil value
// removes the field.
func (s *Spec) SetProcess(fields map[string]any) error {
	process := map[string]json.RawMessage{}
	if old, ok := s.raw["process"]; ok {
		if err := json.Unmarshal(old, &process); err != nil {
			return fmt.Errorf("edit %s: %w", s.path, err)
		}
	}
	if process == nil { // it was null
		process = make(map[string]json.RawMessage)
	}
	for name, value := range fields {
		if value == nil {
			delete(process, name)
			continue
		}
		data, err := marshal(value)
		if err != nil {
			return fmt.Errorf("edit %s: %w", s.path, err)
		}
		process[name] = data
	}
	if err := s.set("process", process); err != nil {
		return err
	}
	s.Process = &specs.Process{}
	if err := json.Unmarshal(s.raw["process"], s.Process); err != nil {
		return fmt.Errorf("edit %s: %w", s.path, err)
	}
	return nil
}

// OwnPIDNamespace gives the container its own PID namespace in place of its
// pod's.
func (s *Spec) OwnPIDNamespace() error {
	if s.Linux == nil || !slices.ContainsFunc(s.Linux.Namespaces, sharesPIDs) {
		return nil
	}
	linux := map[string]json.RawMessage{}
	if err := json.Unmarshal(s.raw["linux"], &linux); err != nil {
		return fmt.Errorf("edit %s: %w", s.path, err)
	}
	namespaces := slices.DeleteFunc(slices.Clone(s.Linux.Namespaces), sharesPIDs)
	namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace})
	data, err := marshal(namespaces)
	if err != nil {
		return fmt.Errorf("edit %s: %w", s.path, err)
	}
	linux["namespaces"] = data
	s.Linux.Namespaces = namespaces
	return s.set("linux", linux)
}

// NetworkNamespace is the path of the network namespace that the engine has made,
// or empty where Kata is to make one.
func (s *Spec) NetworkNamespace() string {
	if s.Linux == nil {
		return ""
	}
	for _, n := range s.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace {
			return n.Path
		}
	}
	return ""
}

func sharesPIDs(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace && n.Path != "" }

func (s *Spec) set(name string, value any) error {
	data, err := marshal(value)
	if err != nil {
		return fmt.Errorf("edit %s: %w", s.path, err)
	}
	s.raw[name] = data
	return nil
}

// Write replaces config.json by the edited spec.
func (s *Spec) Write() error {
	data, err := marshal(s.raw)
	if err != nil {
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	return replaceFile(s.path, data)
}

// marshal does not escape for HTML.
func marshal(v any) (json.RawMessage, error) {
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSpace(buf.Bytes()), nil
}

// replaceFile replaces a file atomically and keeps its mode.
func replaceFile(path string, data []byte) error {
	mode := fs.FileMode(0o600)
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(data)
	err = errclass.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, errclass.Join(err, os.Remove(f.Name())))
	}
	return nil
}
