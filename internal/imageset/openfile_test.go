// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"encoding/json"
	"testing"
)

// JSON has no bytes, and a path that is no UTF-8 comes back all the same.
func TestPathsOfAnyBytes(t *testing.T) {
	for path, want := range map[string]string{
		"/data/plain":   `{"path":"/data/plain","size":5}`,
		"/data/日本":      `{"path":"/data/日本","size":5}`,
		"/data/caf\xe9": `{"path":"/data/caf?","rawPath":"L2RhdGEvY2Fm6Q==","size":5}`,
		"/a\nb":         `{"path":"/a?b","rawPath":"L2EKYg==","size":5}`,
	} {
		data, err := json.Marshal(NewOpenFile([]byte(path), 5, false))
		if err != nil || string(data) != want {
			t.Errorf("%q: %s, %v", path, data, err)
		}
		var f OpenFile
		if err := json.Unmarshal(data, &f); err != nil || string(f.Bytes()) != path {
			t.Errorf("%q: %q, %v", path, f.Bytes(), err)
		}
		if err := (&Manifest{OpenFiles: []OpenFile{f}}).CheckRestore(); err != nil {
			t.Error(err)
		}
	}
	for _, f := range []OpenFile{{Path: "/a", RawPath: []byte("b")}, {Path: "/a", RawPath: []byte{}}, {Path: "/a", RawPath: []byte("/\x00")}} {
		if err := (&Manifest{OpenFiles: []OpenFile{f}}).CheckRestore(); err == nil {
			t.Errorf("%+v is accepted", f)
		}
	}
}
