// Package integration has the scenarios: what users do with checkpoints, from an engine's calls to the workload's own numbers, in VMs.
//
// A scenario gets its results from containerd, from what the workload prints and from files; it never looks into the parts under test. Each
// leaves nothing behind, and that is checked. `make e2e RUN=NAME` runs one.
package integration

import (
	"cmp"
	"os"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// kataEnv names the directory of a real Kata, on which the scenarios then run in place of the stand-in.
const kataEnv = "TESTBED_KATA"

// bothWaysEnv has all scenarios run on both ways of the stand-in.
const bothWaysEnv = "TESTBED_BOTH_WAYS"

// scenarioCase is a scenario and what it is tried with.
type scenarioCase struct {
	name string
	run  func(*scenario)
	// guestMounts are the propagations with which the guest is tried; shared, as systemd has it, where none is given.
	guestMounts []string
	// containerd is the release, where it is another than that of the rest.
	containerd string
	// way is the stand-in's, where one is enough for most runs. Two of these scenarios run at a time, after the others.
	way testbed.Way
	// cri: it is about pods, or about their network.
	cri bool
	// timeout is [scenarioTimeout] where none is given.
	timeout time.Duration
}

var scenarios = []scenarioCase{
	{name: "exit-and-restore", run: exitAndRestore},
	{name: "leave-running", run: leaveRunning},
	{name: "paused-before", run: pausedBefore},
	{name: "volumes-and-files", run: volumesAndFiles},
	{name: "exchange-withdrawn", run: exchangeWithdrawn},
	{name: "shared-and-private-mounts", run: sharedAndPrivateMounts, guestMounts: []string{testbed.Shared, testbed.Private}},
	{name: "shm-and-memory", run: shmAndMemory},
	{name: "lifecycle-after-restore", run: lifecycleAfterRestore},
	{name: "terminal", run: terminal},
	{name: "exec-running-during-checkpoint", run: execRunningDuringCheckpoint},
	{name: "exec-while-frozen", run: execWhileFrozen},
	{name: "process-tree", run: processTree},
	{name: "three-cycles", run: threeCycles},
	{name: "thirty-cycles", run: thirtyCycles, way: testbed.Go, timeout: 8 * time.Minute},
	{name: "broken-images", run: brokenImages},
	{name: "refused", run: refused},
	{name: "refused-without-agent", run: refusedWithoutAgent},
	{name: "refused-no-room", run: refusedNoRoom},
	{name: "refused-guest-bundle", run: refusedGuestBundle},
	{name: "ways-in", run: waysIn},
	{name: "memory-256m", run: memory256},
	{name: "pod-shared-pid", run: podSharedPID},
	{name: "pod-shm-two-restores", run: podShmTwoRestores},
	{name: "network", run: networked},
	{name: "network-hotplugged", run: networkHotplugged},
	{name: "work-path", run: workPath},
	{name: "annotation-leave-running", run: annotationLeaveRunning},
	{name: "nerdctl-default-stops", run: nerdctlDefaultStops},
	{name: "nerdctl-life", run: nerdctlLife, cri: true, way: testbed.Rust, timeout: 8 * time.Minute},
	{name: "docker-life", run: dockerLife, way: testbed.Go, timeout: 8 * time.Minute},
	{name: "ctr-image-roundtrip", run: ctrImageRoundtrip},
	{name: "hooks-in-spec", run: hooksInSpec},
	{name: "tcp-listen", run: tcpListen},
	{name: "tcp-established-refused", run: tcpEstablishedRefused},
	{name: "tcp-established", run: tcpEstablished},
	{name: "tcp-inside", run: tcpInside},
	{name: "containerd-killed-idle", run: containerdKilledIdle},
	{name: "containerd-killed-paused", run: containerdKilledPaused},
	{name: "containerd-killed-mid-checkpoint", run: containerdKilledMidCheckpoint},
	{name: "containerd-killed-mid-restore", run: containerdKilledMidRestore},
	{name: "deadline", run: deadline},
	{name: "containerd-2.1", run: containerdRelease, containerd: "2.1", way: testbed.Go},
	{name: "containerd-2.2", run: containerdRelease, containerd: "2.2", way: testbed.Rust},
	{name: "containerd-2.3", run: containerdRelease, containerd: "2.3", way: testbed.Go},
	{name: "containerd-2.4", run: containerdRelease, containerd: "2.4", way: testbed.Rust},
	{name: "crictl-checkpoint", run: crictlCheckpoint, cri: true},
	{name: "crictl-checkpoint-2.1", run: crictlCheckpoint, cri: true, containerd: parts.OldestContainerd, way: testbed.Go},
	{name: "restore-archive-2.3", run: restoreArchive, cri: true, containerd: "2.3", way: testbed.Rust},
	{name: "checkpointctl-reads-it", run: checkpointctlReadsIt, cri: true, way: testbed.Rust},
	{name: "pod-two-containers", run: podTwoContainers, cri: true, way: testbed.Go},
	{name: "pod-two-at-once", run: podTwoAtOnce, cri: true, way: testbed.Rust},
	{name: "exec-probe-outlives-checkpoint", run: execProbeOutlivesCheckpoint, cri: true, way: testbed.Go},
	{name: "restore-by-annotation", run: restoreByAnnotation, cri: true},
	{name: "restore-by-annotation-missing", run: restoreByAnnotationMissing, cri: true, way: testbed.Rust},
	{name: "rootfs-diff-applied", run: rootfsDiffApplied, cri: true, way: testbed.Go},
	{name: "archive-has-no-authority", run: archiveHasNoAuthority, cri: true, way: testbed.Rust},
	{name: "nri-absent", run: nriAbsent, cri: true, way: testbed.Go},
	{name: "nri-restarted", run: nriRestarted, cri: true, way: testbed.Rust},
	{name: "nri-other-runtime-untouched", run: nriOtherRuntimeUntouched, cri: true, way: testbed.Go},
	{name: "kubelet-checkpoint-api", run: kubeletCheckpointAPI, cri: true, way: testbed.Rust},
	{name: "killed", run: killed, timeout: 30 * time.Minute},
}

// variant is a kind of guest under the parts under test.
type variant struct {
	kata        string // directory of a real Kata; empty: the stand-in
	way         testbed.Way
	guestMounts string
	containerd  string
	cri         bool
}

func (v variant) name() string {
	kind := "standin"
	if v.kata != "" {
		kind = "kata"
	}
	name := kind + "-" + string(v.way)
	if v.guestMounts != testbed.Shared {
		name += "-" + v.guestMounts
	}
	if v.cri {
		name += "-cri"
	}
	if v.containerd != parts.ContainerdVersion {
		name += "-" + v.containerd
	}
	return name
}

func (c scenarioCase) variants(t *testing.T) []variant {
	t.Helper()
	kinds := []variant{{way: testbed.Go}, {way: testbed.Rust}}
	if c.way != "" && os.Getenv(bothWaysEnv) == "" {
		kinds = []variant{{way: c.way}}
	}
	if dir := os.Getenv(kataEnv); dir != "" {
		way, err := testbed.WayOfKata(dir)
		if err != nil {
			t.Fatal(err)
		}
		kinds = []variant{{kata: dir, way: way}}
	}
	guestMounts := c.guestMounts
	if len(guestMounts) == 0 {
		guestMounts = []string{testbed.Shared}
	}
	var out []variant
	for _, kind := range kinds {
		for _, mounts := range guestMounts {
			kind.guestMounts, kind.containerd, kind.cri = mounts, cmp.Or(c.containerd, parts.ContainerdVersion), c.cri
			out = append(out, kind)
		}
	}
	return out
}

func TestScenario(t *testing.T) {
	if testing.Short() {
		t.Skip("scenarios boot VMs, which takes minutes: not with -short")
	}
	if os.Getuid() != 0 {
		t.Skip("scenarios mount, make network namespaces and start containerd: only as root")
	}
	beds := newTestbeds(t)
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			if s.way != "" {
				t.Parallel()
			}
			for _, v := range s.variants(t) {
				t.Run(v.name(), func(t *testing.T) {
					t.Parallel() // with the scenario's other variants
					s.run(newScenario(t, beds, v, cmp.Or(s.timeout, scenarioTimeout)))
				})
			}
		})
	}
}
