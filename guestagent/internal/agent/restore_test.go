// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// A restore that was given up while the agent could not notice, such as in a VM that
// was stopped, lets no process run.
func TestNothingRunsOfARestoreThatWasGivenUp(t *testing.T) {
	givenUp := errors.New("the caller is gone")
	for name, cause := range map[string]error{"given up": givenUp, "awaited": nil} {
		t.Run(name, func(t *testing.T) {
			placeholder := exec.Command("sh", "-c", `sh -c 'echo $$; read line'; :`)
			line, err := testproc.Start(t, placeholder).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			restored := strings.TrimSpace(line)
			a, c := adopted(t, placeholder.Process.Pid)
			tree := filepath.Join(c.Cgroup, restoredCgroup)
			if err := os.Mkdir(tree, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(tree, "cgroup.procs"), []byte(restored), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := cgroup.Hold(t.Context(), tree); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cgroup.Thaw(tree) })
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if cause != nil {
				cancel(cause)
			}
			if err := a.letRun(ctx, c, tree); !errors.Is(err, cause) {
				t.Errorf("it ended with: %v", err)
			}
			if frozen, err := cgroup.Frozen(tree); err != nil || frozen != (cause != nil) {
				t.Errorf("the processes are frozen: %v, error %v", frozen, err)
			}
			record, err := os.ReadFile(a.recordPath(c.ID))
			if err != nil {
				t.Fatal(err)
			}
			if has := strings.Contains(string(record), restored); has != (cause == nil) || has != (c.Restored != nil) {
				t.Errorf("the container's restored process is %v, its record %s", c.Restored, record)
			}
			if c.Restored != nil && strconv.Itoa(c.Restored.PID) != restored {
				t.Errorf("the restored process is %d, not %s", c.Restored.PID, restored)
			}
		})
	}
}
