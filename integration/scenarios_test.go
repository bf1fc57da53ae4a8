// SPDX-License-Identifier: Apache-2.0

// Package integration has the scenarios: what users do with checkpoints, from
// an engine's calls to the workload's own numbers, in VMs.
//
// A scenario takes its results from containerd, from what the workload prints
// and from files; it never looks into the parts under test. Each leaves nothing
// behind, and that is checked. `make e2e RUN=NAME` runs one of them.
package integration

import (
	"cmp"
	"flag"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

const (
	// kataEnv names the directory of a real Kata, on which the scenarios run in
	// place of the stand-in.
	kataEnv = "TESTBED_KATA"
	// coreEnv leaves out the scenarios, and the ways of the stand-in, that are
	// not in the core set.
	coreEnv = "TESTBED_CORE"
)

// core reports whether only the core set runs.
var core = os.Getenv(coreEnv) != ""

// kind is what a scenario is about. The core set has at least one of each.
type kind string

const (
	kindBasics         kind = "checkpoint and restore"
	kindFiles          kind = "files and mounts"
	kindMemory         kind = "memory"
	kindExecs          kind = "exec, signals and terminals"
	kindProcesses      kind = "processes"
	kindCases          kind = "programs that are hard to checkpoint"
	kindCycles         kind = "repeated checkpoints"
	kindDamage         kind = "damaged image sets"
	kindRefusals       kind = "refusals"
	kindAttacks        kind = "attack surface"
	kindSandboxes      kind = "several containers in a sandbox"
	kindNetworks       kind = "networks and connections"
	kindEngines        kind = "engines and their options"
	kindRestarts       kind = "containerd restarts"
	kindDeadlines      kind = "deadlines"
	kindOperator       kind = "the operator's tool"
	kindReleases       kind = "containerd releases"
	kindPodCheckpoints kind = "checkpoints by the CRI"
	kindPodRestores    kind = "restores by the CRI"
	kindNRI            kind = "NRI plugin"
	kindKills          kind = "killed parts"
	kindApps           kind = "applications"
)

// scenarioCase is a scenario and what it is tried with.
type scenarioCase struct {
	name string
	kind kind
	run  func(*scenario)
	// core lists the ways of the stand-in on which the scenario is part of the
	// core set. All scenarios together run on both.
	core []testbed.Way
	// guestMounts are the propagations with which the guest is tried; shared,
	// as under systemd, by default.
	guestMounts []string
	// containerd is the release, if it is not that of most scenarios.
	containerd string
	// cri serves the CRI as well: pods and their network.
	cri bool
	// timeout defaults to [scenarioTimeout].
	timeout time.Duration
}

var (
	onGo   = []testbed.Way{testbed.Go}
	onRust = []testbed.Way{testbed.Rust}
	onBoth = []testbed.Way{testbed.Go, testbed.Rust}
)

// scenarios are all there are. What is in the core set runs on the one way or
// the other, alternately; what every user depends on, and what depends on the
// way, runs on both.
var scenarios = []scenarioCase{
	{name: "exit-and-restore", kind: kindBasics, run: exitAndRestore, core: onBoth},
	{name: "leave-running", kind: kindBasics, run: leaveRunning, core: onRust},
	{name: "paused-before", kind: kindBasics, run: pausedBefore, core: onGo},

	{name: "volumes-and-files", kind: kindFiles, run: volumesAndFiles, core: onGo},
	{name: "exchange-withdrawn", kind: kindFiles, run: exchangeWithdrawn, core: onBoth},
	{name: "shared-and-private-mounts", kind: kindFiles, run: sharedAndPrivateMounts, guestMounts: []string{testbed.Shared, testbed.Private}},

	{name: "shm-and-memory", kind: kindMemory, run: shmAndMemory, core: onRust},
	{name: "memory-256m", kind: kindMemory, run: memory256},

	{name: "lifecycle-after-restore", kind: kindExecs, run: lifecycleAfterRestore, core: onBoth},
	{name: "terminal", kind: kindExecs, run: terminal, core: onRust},
	{name: "exec-running-during-checkpoint", kind: kindExecs, run: execRunningDuringCheckpoint},
	{name: "exec-leftovers", kind: kindExecs, run: execLeftovers},
	{name: "job-control", kind: kindExecs, run: jobControl, core: onGo},
	{name: "other-user", kind: kindExecs, run: otherUser},
	{name: "exec-while-frozen", kind: kindExecs, run: execWhileFrozen, core: onGo},

	{name: "process-tree", kind: kindProcesses, run: processTree, core: onGo},

	{name: "cases", kind: kindCases, run: casesRestored, core: onGo},
	{name: "cases-refused", kind: kindCases, run: casesRefused, core: onRust},
	{name: "mounts-changed", kind: kindCases, run: mountsChanged, timeout: 8 * time.Minute},
	{name: "serves-files", kind: kindCases, run: servesFiles, core: onGo},
	{name: "cases-in-a-pod", kind: kindCases, run: casesInAPod},

	{name: "three-cycles", kind: kindCycles, run: threeCycles, core: onRust},
	{name: "fifty-cycles", kind: kindCycles, run: fiftyCycles, timeout: 15 * time.Minute},

	{name: "broken-images", kind: kindDamage, run: brokenImages, core: onGo},

	{name: "refused", kind: kindRefusals, run: refused, core: onRust},
	{name: "refused-without-agent", kind: kindRefusals, run: refusedWithoutAgent, core: onRust},
	{name: "refused-no-room", kind: kindRefusals, run: refusedNoRoom, core: onGo},
	{name: "refused-guest-bundle", kind: kindRefusals, run: refusedGuestBundle},
	{name: "no-room-at-any-step", kind: kindRefusals, run: noRoomAtAnyStep, timeout: 8 * time.Minute},
	{name: "few-descriptors", kind: kindRefusals, run: fewDescriptors, timeout: 8 * time.Minute},

	{name: "ways-in", kind: kindAttacks, run: waysIn, core: onGo},
	{name: "forged-images", kind: kindAttacks, run: forgedImages, core: onRust, timeout: 8 * time.Minute},
	{name: "hostile-guest", kind: kindAttacks, run: hostileGuest, core: onRust, timeout: 8 * time.Minute},

	{name: "pod-shared-pid", kind: kindSandboxes, run: podSharedPID},
	{name: "many-at-once", kind: kindSandboxes, run: manyAtOnce, timeout: 8 * time.Minute},
	{name: "pod-shm-two-restores", kind: kindSandboxes, run: podShmTwoRestores, core: onGo},

	{name: "network", kind: kindNetworks, run: networked, core: onGo},
	{name: "network-hotplugged", kind: kindNetworks, run: networkHotplugged, core: onRust},
	{name: "own-address", kind: kindNetworks, run: ownAddress, core: onGo},
	{name: "tcp-listen", kind: kindNetworks, run: tcpListen},
	{name: "tcp-established-refused", kind: kindNetworks, run: tcpEstablishedRefused, core: onRust},
	{name: "tcp-probed", kind: kindNetworks, run: tcpProbed},
	{name: "tcp-inside", kind: kindNetworks, run: tcpInside, core: onRust},
	{name: "tcp-established", kind: kindNetworks, run: tcpEstablished, core: onGo},

	{name: "work-path", kind: kindEngines, run: workPath},
	{name: "reflinks", kind: kindEngines, run: reflinks},
	{name: "annotation-leave-running", kind: kindEngines, run: annotationLeaveRunning, core: onGo},
	{name: "nerdctl-default-stops", kind: kindEngines, run: nerdctlDefaultStops},
	{name: "nerdctl-life", kind: kindEngines, run: nerdctlLife, core: onRust, cri: true, timeout: 8 * time.Minute},
	{name: "docker-life", kind: kindEngines, run: dockerLife, timeout: 8 * time.Minute},
	{name: "ctr-image-roundtrip", kind: kindEngines, run: ctrImageRoundtrip, core: onGo},
	{name: "pre-dump-life", kind: kindCycles, run: preDumpLife, cri: true, timeout: 10 * time.Minute},
	{name: "pre-dump-user-pause", kind: kindEngines, run: preDumpUserPause},
	{name: "early-thaw", kind: kindEngines, run: earlyThaw, cri: true},
	{name: "hooks-in-spec", kind: kindEngines, run: hooksInSpec, core: onRust},

	{name: "containerd-killed-idle", kind: kindRestarts, run: containerdKilledIdle},
	{name: "containerd-killed-paused", kind: kindRestarts, run: containerdKilledPaused},
	{name: "containerd-killed-mid-checkpoint", kind: kindRestarts, run: containerdKilledMidCheckpoint, core: onGo},
	{name: "containerd-killed-mid-restore", kind: kindRestarts, run: containerdKilledMidRestore, core: onRust},

	{name: "install-twice-and-uninstall", kind: kindOperator, run: installTwiceAndUninstall, core: onGo},
	{name: "upgrade-running", kind: kindOperator, run: upgradeRunning, core: onRust, timeout: 8 * time.Minute},
	{name: "deb-install-remove", kind: kindOperator, run: debInstallRemove},
	{name: "initrd", kind: kindOperator, run: agentInInitrd},
	{name: "check-container", kind: kindOperator, run: checkContainer},
	{name: "metrics", kind: kindOperator, run: metricsServed, cri: true},
	{name: "traces", kind: kindOperator, run: traced, cri: true},
	{name: "check-each-fault", kind: kindOperator, run: checkEachFault},
	{name: "check-good", kind: kindOperator, run: checkGood, cri: true},

	{name: "cli-life", kind: kindOperator, run: cliLife, cri: true, timeout: 8 * time.Minute},
	{name: "pod-one-instant", kind: kindOperator, run: podOneInstant, cri: true},
	{name: "export-others-read-it", kind: kindOperator, run: exportOthersReadIt, cri: true},
	{name: "encrypted-export", kind: kindOperator, run: encryptedExport},
	{name: "verify-finds-damage", kind: kindOperator, run: verifyFindsDamage},
	{name: "progress", kind: kindOperator, run: progressShown},

	{name: "stuck-parts", kind: kindDeadlines, run: stuckParts, timeout: 8 * time.Minute},
	{name: "stuck-restores", kind: kindDeadlines, run: stuckRestores, timeout: 8 * time.Minute},
	{name: "lost-virtiofsd", kind: kindDeadlines, run: lostVirtiofsd, timeout: 8 * time.Minute},
	{name: "calls-during-restore", kind: kindDeadlines, run: callsDuringRestore},
	{name: "clock-steps", kind: kindDeadlines, run: clockSteps},
	{name: "deadline", kind: kindDeadlines, run: deadline, core: onGo},

	{name: "containerd-2.1", kind: kindReleases, run: containerdRelease, core: onGo, containerd: "2.1"},
	{name: "containerd-2.2", kind: kindReleases, run: containerdRelease, containerd: "2.2"},
	{name: "containerd-2.3", kind: kindReleases, run: containerdRelease, containerd: "2.3"},
	{name: "containerd-2.4", kind: kindReleases, run: containerdRelease, containerd: "2.4"},

	{name: "crictl-checkpoint", kind: kindPodCheckpoints, run: crictlCheckpoint, core: onGo, cri: true},
	{name: "crictl-checkpoint-2.1", kind: kindPodCheckpoints, run: crictlCheckpoint, cri: true, containerd: parts.OldestContainerd},
	{name: "checkpointctl-reads-it", kind: kindPodCheckpoints, run: checkpointctlReadsIt, cri: true},
	{name: "pod-two-containers", kind: kindPodCheckpoints, run: podTwoContainers, cri: true},
	{name: "pod-two-at-once", kind: kindPodCheckpoints, run: podTwoAtOnce, core: onRust, cri: true},
	{name: "exec-probe-outlives-checkpoint", kind: kindPodCheckpoints, run: execProbeOutlivesCheckpoint, cri: true},
	{name: "checkpoint-restore-operator", kind: kindPodCheckpoints, run: operatorRetains, cri: true, timeout: 8 * time.Minute},
	{name: "kubelet-checkpoint-api", kind: kindPodCheckpoints, run: kubeletCheckpointAPI, cri: true},

	{name: "restore-by-annotation", kind: kindPodRestores, run: restoreByAnnotation, core: onGo, cri: true},
	{name: "restore-by-annotation-missing", kind: kindPodRestores, run: restoreByAnnotationMissing, cri: true},
	{name: "restore-archive-2.3", kind: kindPodRestores, run: restoreArchive, cri: true, containerd: "2.3"},
	{name: "rootfs-diff-applied", kind: kindPodRestores, run: rootfsDiffApplied, core: onRust, cri: true},
	{name: "archive-has-no-authority", kind: kindPodRestores, run: archiveHasNoAuthority, core: onGo, cri: true},

	{name: "nri-absent", kind: kindNRI, run: nriAbsent, cri: true},
	{name: "nri-restarted", kind: kindNRI, run: nriRestarted, core: onRust, cri: true},
	{name: "nri-other-runtime-untouched", kind: kindNRI, run: nriOtherRuntimeUntouched, cri: true},

	{name: "app-postgresql", kind: kindApps, run: appPostgreSQL, core: onGo, timeout: 8 * time.Minute},
	{name: "app-jvm", kind: kindApps, run: appJVM, core: onGo, timeout: 8 * time.Minute},
	{name: "app-node", kind: kindApps, run: appNode, core: onGo, timeout: 8 * time.Minute},
	{name: "app-redis", kind: kindApps, run: appRedis, timeout: 8 * time.Minute},
	{name: "app-nginx", kind: kindApps, run: appNginx, timeout: 8 * time.Minute},
	{name: "app-bubblewrap", kind: kindApps, run: appBubblewrap, timeout: 8 * time.Minute},
	{name: "app-dbus", kind: kindApps, run: appDBus, timeout: 8 * time.Minute},
	{name: "app-python", kind: kindApps, run: appPython, timeout: 8 * time.Minute},
	{name: "app-go", kind: kindApps, run: appGo, timeout: 8 * time.Minute},

	{name: "out-of-memory", kind: kindKills, run: outOfMemory},
	{name: "killed", kind: kindKills, run: killed, core: onRust, timeout: 30 * time.Minute},
}

// variant is a kind of guest below the parts under test.
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

// variants lists what the scenario runs on: on the given real Kata, or else on
// the stand-in. Out of the core set it may be nothing.
func (c scenarioCase) variants(kata string, core bool) ([]variant, error) {
	if core && len(c.core) == 0 {
		return nil, nil
	}
	ways := onBoth
	switch {
	case kata != "":
		way, err := testbed.WayOfKata(kata)
		if err != nil {
			return nil, err
		}
		ways = []testbed.Way{way}
	case core:
		ways = c.core
	}
	guestMounts := c.guestMounts
	if len(guestMounts) == 0 {
		guestMounts = []string{testbed.Shared}
	}
	var out []variant
	for _, way := range ways {
		for _, mounts := range guestMounts {
			out = append(out, variant{
				kata: kata, way: way, guestMounts: mounts, containerd: cmp.Or(c.containerd, parts.ContainerdVersion), cri: c.cri,
			})
		}
	}
	return out, nil
}

// TestScenario runs as many scenarios at a time as -parallel says, each in a VM
// of its own.
func TestScenario(t *testing.T) {
	if testing.Short() {
		t.Skip("scenarios boot VMs, which takes minutes: not with -short")
	}
	if os.Getuid() != 0 {
		t.Skip("scenarios mount, make network namespaces and start containerd: only as root")
	}
	atOnce, err := strconv.Atoi(flag.Lookup("test.parallel").Value.String())
	if err != nil {
		t.Fatal(err)
	}
	turns := newTurns(atOnce)
	waiting := map[string][]*turn{} // by the scenario's name
	for _, c := range scenarios {
		variants, err := c.variants(os.Getenv(kataEnv), core)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range variants {
			waiting[c.name] = append(waiting[c.name], turns.add(v, c.timeout))
		}
	}
	beds := newTestbeds(t)
	turns.begin()
	var all sync.WaitGroup
	for _, c := range scenarios {
		mine := waiting[c.name]
		if len(mine) == 0 {
			continue
		}
		all.Go(func() {
			t.Run(c.name, func(t *testing.T) {
				var each sync.WaitGroup
				defer each.Wait()
				for _, turn := range mine {
					each.Go(func() {
						<-turn.come
						defer turns.end(turn)
						t.Run(turn.variant.name(), func(t *testing.T) { c.run(newScenario(t, beds, turn.variant, cmp.Or(c.timeout, scenarioTimeout))) })
					})
				}
			})
			for _, turn := range mine {
				turns.end(turn) // -run has left it out
			}
		})
	}
	all.Wait()
}

// TestCore checks that the core set is what it is meant to be.
func TestCore(t *testing.T) {
	covered, names, ways := map[kind]bool{}, map[string]bool{}, map[testbed.Way]int{}
	for _, c := range scenarios {
		if c.kind == "" || c.name == "" || names[c.name] {
			t.Errorf("scenario %q of kind %q: needs a kind and a name of its own", c.name, c.kind)
		}
		names[c.name] = true
		covered[c.kind] = covered[c.kind] || len(c.core) > 0
		for _, way := range c.core {
			ways[way]++
		}
		if (c.name == "exit-and-restore" || c.name == "lifecycle-after-restore") && !slices.Equal(c.core, onBoth) {
			t.Errorf("%s is in the core set on %v, not on both ways", c.name, c.core)
		}
	}
	for kind, has := range covered {
		if !has {
			t.Errorf("no scenario of the kind %q is in the core set", kind)
		}
	}
	if a, b := ways[testbed.Go], ways[testbed.Rust]; a < b/2 || b < a/2 {
		t.Errorf("of the core set %d run on one way and %d on the other", a, b)
	}
}
