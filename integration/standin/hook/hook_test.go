// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestAHookGetsItsStateAndNoEnvironment(t *testing.T) {
	t.Setenv("OURS", "1")
	out := filepath.Join(t.TempDir(), "out")
	h := specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", `cat > ` + out + `; echo "$OURS$THEIRS" >> ` + out}, Env: []string{"THEIRS=2"}}
	if err := Run(t.Context(), h, map[string]int{"pid": 7}, Limit); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if want := "{\"pid\":7}2\n"; string(got) != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestAHooksOutputIsInItsError(t *testing.T) {
	err := Run(t.Context(), specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "echo why >&2; exit 3"}}, nil, 0)
	if err == nil || !strings.Contains(err.Error(), "why") {
		t.Error(err)
	}
}

func TestADaemonThatKeepsItsOutputUsesUpTheLimit(t *testing.T) {
	start := time.Now()
	h := specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", "sleep 600 & exit 0"}}
	err := Run(context.Background(), h, nil, 300*time.Millisecond)
	if err == nil {
		t.Error("the hook was taken for done")
	}
	if took := time.Since(start); took > time.Minute {
		t.Errorf("took %s", took)
	}
}
