// SPDX-License-Identifier: Apache-2.0

package stopat

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestFileName(t *testing.T) {
	for in, want := range map[[2]string]string{
		{"checkpoint", "freeze"}:        "checkpoint-freeze",
		{"checkpoint", "save /dev/shm"}: "checkpoint-save-devshm",
	} {
		if got := FileName(in[0], in[1]); got != want {
			t.Errorf("%v: %s, want %s", in, got, want)
		}
	}
}

// Nothing that an operator installs can be stopped by a file: the text that the
// hooks need is in none of the binaries without the tag, and in those with it.
func TestReleaseHasNoHooks(t *testing.T) {
	if testing.Short() {
		t.Skip("links the product twice")
	}
	const module = "github.com/kata-checkpoint/kata-checkpoint"
	for command, needles := range map[string][]string{
		"containerd-shim-kata-checkpoint-v2": {"KATA_CHECKPOINT_STOP_DIR", ".reached", "stopped by a test"},
		"kata-checkpoint-agent":              {"/run/kata-checkpoint/stop", ".reached", "stopped by a test"},
	} {
		for _, tags := range []string{"", "testhooks"} {
			out := filepath.Join(t.TempDir(), command)
			build := exec.Command("go", "build", "-buildvcs=false", "-tags", tags, "-o", out, module+"/cmd/"+command)
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if output, err := build.CombinedOutput(); err != nil {
				t.Fatalf("build %s: %v\n%s", command, err, output)
			}
			binary, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			for _, needle := range needles {
				if has, want := bytes.Contains(binary, []byte(needle)), tags != ""; has != want {
					t.Errorf("%s, built with tags %q, has %q: %t", command, tags, needle, has)
				}
			}
		}
	}
}
