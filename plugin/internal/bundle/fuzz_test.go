// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// An edited spec is still one, and whatever was not edited is as it was, known
// or not.
func FuzzSpec(f *testing.F) {
	f.Add([]byte(`{"ociVersion":"1.3.0","process":{"args":["sh"],"cwd":"/","user":{"uid":1,"later":true},"later":[1e400]},"mounts":[{"destination":"/proc","later":{}}],
		"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"},{"type":"ipc"}],"later":"<&>"},"later":{"a":[null]}}`))
	f.Add([]byte(`{"mounts":null,"process":null,"linux":null}`))
	f.Add([]byte(`{"process":{}}`))
	f.Add([]byte(`{"Mounts":[],"mounts":[{"destination":"/x"}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		path := filepath.Join(dir, specName)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := ReadSpec(dir)
		if err != nil {
			return
		}
		before := len(s.Mounts)
		var old map[string]json.RawMessage
		if err := json.Unmarshal(data, &old); err != nil {
			t.Fatal(err)
		}
		if s.AddMount(specs.Mount{Destination: "/new", Type: "bind"}) != nil || s.SetProcess(map[string]any{"args": []string{"placeholder"}}) != nil || s.OwnPIDNamespace() != nil {
			return // fields that JSON has twice, in other letters
		}
		if err := s.Write(); err != nil {
			t.Fatal(err)
		}
		again, err := ReadSpec(dir)
		if err != nil {
			t.Fatalf("the edited spec: %v", err)
		}
		if len(again.Mounts) != before+1 && len(old["Mounts"]) == 0 || again.Process == nil || len(again.Process.Args) != 1 {
			t.Errorf("%d mounts of %d, process %+v", len(again.Mounts), before, again.Process)
		}
		written, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var now map[string]json.RawMessage
		if err := json.Unmarshal(written, &now); err != nil {
			t.Fatal(err)
		}
		for key, value := range old {
			switch key {
			case "mounts", "process", "linux":
				continue
			}
			var want, have any
			if json.Unmarshal(value, &want) != nil {
				continue // a number that Go does not have
			}
			if err := json.Unmarshal(now[key], &have); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, have); diff != "" {
				t.Errorf("%s (-before +after):\n%s", key, diff)
			}
		}
	})
}
