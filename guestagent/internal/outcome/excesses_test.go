// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// A process that has more than the specification gives its container is named while
// the container runs. One with less, or one that has exited, is not.
func TestExcesses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("limits capabilities, which takes root")
	}
	start := func(args ...string) int {
		cmd := exec.Command("setpriv", append(append([]string{"--inh-caps=-all"}, args...), "sh", "-c", "ulimit -n 512; echo; read line")...)
		testproc.Ready(t, cmd)
		return cmd.Process.Pid
	}
	few := start("--bounding-set", "-all,+chown,+setuid,+setgid,+setpcap,+net_raw")
	all := start()
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*api.Rights)) *api.Rights {
		r := rootRights(false)
		r.Limits = map[string]uint64{"RLIMIT_NOFILE": 512, "RLIMIT_NICE": 0}
		change(r)
		return r
	}
	for name, tc := range map[string]struct {
		pid    int
		rights *api.Rights
		want   []string
	}{
		"what the container has": {few, with(func(*api.Rights) {}), nil},
		"a privileged exec": {
			all, with(func(*api.Rights) {}),
			[]string{"has the capabilities CAP_", "in its bounding set, which the container does not"},
		},
		"a limit that the specification sets":                 {few, with(func(r *api.Rights) { r.Limits["RLIMIT_NOFILE"] = 256 }), []string{"has the limit NOFILE 512, and the container 256"}},
		"no no_new_privs":                                     {few, with(func(r *api.Rights) { r.NoNewPrivs = true }), []string{"lacks no_new_privs"}},
		"a limit of the agent's, which an exec of Kata's has": {few, with(func(r *api.Rights) { r.Limits["RLIMIT_NOFILE"], r.Execs = 256, true }), nil},
		"no no_new_privs, as an exec of Kata's has it":        {few, with(func(r *api.Rights) { r.NoNewPrivs, r.Execs = true, true }), nil},
		"an exec as another user": {
			few, with(func(r *api.Rights) { r.Uid, r.Capabilities, r.Permitted, r.Execs = 1000, nil, nil, true }), []string{"has the user 0, which the container cannot become"},
		},
	} {
		found, err := Excesses(os.Getpid(), []int{gone.Process.Pid, tc.pid}, tc.rights)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var texts []string
		for _, e := range found {
			if e.PID != tc.pid {
				t.Errorf("%s: process %d %s", name, e.PID, e.What)
			}
			texts = append(texts, e.What)
		}
		have := strings.Join(texts, "; ")
		if tc.want == nil && have != "" {
			t.Errorf("%s: %s", name, have)
		}
		for _, want := range tc.want {
			if !strings.Contains(have, want) {
				t.Errorf("%s: %q lacks %q", name, have, want)
			}
		}
	}
}
