// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func TestResources(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("changes limits, which takes root")
	}
	priority, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	own := 20 - priority // a nice value, as the system call returns it
	cmd := exec.Command("prlimit", "--nofile=100:2000", "--nproc=1000:2000", "--memlock=1000:1000", "choom", "-n", "50", "--",
		"nice", "-n", strconv.Itoa(-5-own), "sh", "-c", "echo; read line")
	testproc.Ready(t, cmd)
	pid := cmd.Process.Pid
	limits, err := hardLimits(pid)
	if err != nil {
		t.Fatal(err)
	}
	look := func(c Container) []string {
		t.Helper()
		c.pid, c.label = os.Getpid(), label(pid)
		k := &check{Container: &c}
		if err := k.resources(pid); err != nil {
			t.Fatal(err)
		}
		if err := k.scheduling(pid, pid); err != nil {
			t.Fatal(err)
		}
		return k.findings()
	}
	lower := slices.Clone(limits)
	lower[unix.RLIMIT_NOFILE], lower[unix.RLIMIT_NPROC], lower[unix.RLIMIT_MEMLOCK] = 1000, 500, 0
	lower[unix.RLIMIT_NICE] = 0
	nice := slices.Clone(lower)
	nice[unix.RLIMIT_NICE] = 25
	for name, tc := range map[string]struct {
		may  Container
		want []string
	}{
		"as much": {Container{limits: slices.Concat(limits[:unix.RLIMIT_NICE], []uint64{25}, limits[unix.RLIMIT_NICE+1:]), oomScore: 50}, nil},
		"more": {Container{limits: lower, oomScore: 51}, []string{
			"has the limit NOFILE 2000, and the container 1000", "has the limit MEMLOCK 1000, and the container 0",
			"has the oom_score_adj 50, and the container 51", "has the nice value -5",
		}},
		"what RLIMIT_NICE allows":      {Container{limits: nice, oomScore: 51}, []string{"NOFILE", "MEMLOCK", "has the oom_score_adj"}},
		"what CAP_SYS_RESOURCE allows": {Container{limits: lower, oomScore: 51, rights: rights{bounding: caps(capability.CAP_SYS_RESOURCE, capability.CAP_SYS_NICE)}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			found := look(tc.may)
			if len(found) != len(tc.want) {
				t.Fatalf("findings %q, want %q", found, tc.want)
			}
			for i, f := range found {
				if !strings.Contains(f, tc.want[i]) {
					t.Errorf("finding %q lacks %q", f, tc.want[i])
				}
			}
		})
	}
	// One that the size of the guest's memory decides is lowered.
	var nproc unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NPROC, nil, &nproc); err != nil {
		t.Fatal(err)
	}
	if nproc.Cur != 500 || nproc.Max != 500 {
		t.Errorf("NPROC is %+v", nproc)
	}
}
