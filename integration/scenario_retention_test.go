// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// operatorEnv names the program of checkpoint-restore-operator (its `make
// build`, bin/manager), of which nothing is here.
const operatorEnv = "TESTBED_OPERATOR"

// inPod starts a program as the only one that sees a service account, where
// pods have it.
const inPod = `#!/bin/sh
exec unshare --mount sh -ec '
    mount -t tmpfs tmpfs /run
    mkdir -p /run/secrets/kubernetes.io
    cp -r "$1" /run/secrets/kubernetes.io/serviceaccount
    shift
    exec "$@"' sh "$@"
`

// taken is a checkpoint that the kubelet was asked for.
type taken struct {
	archive          string
	earliest, latest int // between which numbers of the counter
}

// takenCheckpoints are those of a container in a cluster whose kubelet only
// makes checkpoints, by the same call of the CRI as the real one.
type takenCheckpoints struct {
	s   *scenario
	dir string
	c   *cri.Container
	// path is where the container's checkpoints are asked for.
	path string

	mu  sync.Mutex
	all []taken
}

func (k *takenCheckpoints) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || r.URL.Path != k.path {
		fail(w, http.StatusNotFound, "NotFound", r.URL.Path)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	name, err := k.checkpoint()
	if err != nil {
		k.s.Error(err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer(w, http.StatusOK, object{"items": []string{name}})
}

func (k *takenCheckpoints) checkpoint() (string, error) {
	printed := func() (int, error) {
		lines, err := k.c.Lines()
		if err != nil {
			return 0, err
		}
		ticks, err := workload.Ticks(lines)
		return len(ticks), err
	}
	earliest, err := printed()
	if err != nil {
		return "", err
	}
	archive := filepath.Join(k.dir, archiveName(time.Now()))
	if err := k.c.Checkpoint(k.s.ctx, archive); err != nil {
		return "", err
	}
	latest, err := printed()
	// One more may have been counted than was in the log by then.
	k.all = append(k.all, taken{archive, earliest, latest + 1})
	return archive, err
}

// archives are what was checkpointed so far.
func (k *takenCheckpoints) archives() []taken {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.all)
}

// archiveName is how the kubelet calls an archive of the scenario's container.
func archiveName(at time.Time) string {
	return fmt.Sprintf("checkpoint-web_%s-c-%s.tar", podNamespace, at.Format(time.RFC3339))
}

// wait waits until so many checkpoints were taken.
func (k *takenCheckpoints) wait(n int) []taken {
	k.s.Helper()
	if !k.s.eventually(time.Minute, func() bool { return len(k.archives()) >= n }) {
		k.s.Fatalf("the operator has had the checkpoints %v taken, not %d", k.archives(), n)
	}
	k.s.step("checkpoint %d", n)
	return k.archives()
}

// checkLeft waits until the archives in the directory are these.
func (k *takenCheckpoints) checkLeft(why string, want ...string) {
	k.s.Helper()
	var left []string
	if !k.s.eventually(30*time.Second, func() bool {
		found, err := filepath.Glob(filepath.Join(k.dir, "checkpoint-*.tar"))
		k.s.check(err)
		left = found
		slices.Sort(want)
		return slices.Equal(left, want)
	}) {
		k.s.Errorf("%s: there is %q, not %q", why, left, want)
	}
	k.s.step("%s", why)
}

// operatorRetains: checkpoint-restore-operator has a pod's container
// checkpointed by a schedule, when its node is drained and as a forensic chain,
// and removes what is more than its retention policy allows, our exports among
// it. What it leaves can be restored.
func operatorRetains(s *scenario) {
	program := os.Getenv(operatorEnv)
	if program == "" {
		s.Skipf("%s names no checkpoint-restore-operator: build it from its sources (docs/retention.md)", operatorEnv)
	}
	const (
		custom   = "/apis/criu.org/v1/namespaces/default/"
		policy   = custom + "checkpointrestoreoperators/policy"
		podPath  = "/api/v1/namespaces/" + podNamespace + "/pods/web"
		nodePath = "/api/v1/nodes/node"
	)
	o := s.operator()
	pod := s.runPod("web", cri.PodSpec{})
	c := s.runIn(pod, counterNamed("c"))
	s.waitTicks(c, 5)
	dir := s.testbed.RestoreDir()
	s.check(os.MkdirAll(dir, 0o700))
	s.afterContainers(func() error { return os.RemoveAll(dir) })
	k := &takenCheckpoints{s: s, dir: dir, c: c, path: "/checkpoint/" + podNamespace + "/web/c"}

	// Two exports that are older than all that follows.
	o.must("create", podNamespace+"/web/c", "mine")
	identity, err := age.GenerateX25519Identity()
	s.check(err)
	day := 24 * time.Hour
	plain, secret := filepath.Join(dir, archiveName(time.Now().Add(-day))), filepath.Join(dir, archiveName(time.Now().Add(-2*day)))
	o.must("export", "mine", plain, "--compress", "zstd")
	o.must("export", "mine", secret, "--recipient", identity.Recipient().String())
	for path, before := range map[string]time.Duration{plain: day, secret: 2 * day} {
		s.check(os.Chtimes(path, time.Time{}, time.Now().Add(-before)))
	}

	cluster := s.startCluster(k)
	cluster.apply("/api/v1/namespaces/"+podNamespace, "Namespace", object{"metadata": object{}})
	cluster.apply(nodePath, "Node", object{"metadata": object{}, "spec": object{}})
	cluster.apply(podPath, "Pod", object{
		"metadata": object{"labels": object{"app": "web"}},
		"spec":     object{"nodeName": "node", "containers": []object{{"name": "c", "image": "workload"}}},
		"status":   object{"phase": "Running"},
	})
	limits := func(retainOrphan, now bool) {
		cluster.apply(policy, "CheckpointRestoreOperator", object{"metadata": object{}, "spec": object{
			"checkpointDirectory": dir, "applyPoliciesImmediately": now,
			"globalPolicy": object{"maxCheckpointsPerContainer": 2, "retainOrphan": retainOrphan},
		}})
	}
	limits(true, false)
	s.startOperator(program, cluster)

	selected := object{"namespace": podNamespace, "selector": object{"matchLabels": object{"app": "web"}}}
	with := func(more object) object {
		maps.Copy(more, selected)
		return object{"metadata": object{}, "spec": more}
	}
	cluster.apply(custom+"checkpointschedules/often", "CheckpointSchedule", with(object{"triggers": object{"interval": "5s"}}))
	pinned := k.wait(1)[0].archive
	s.check(os.WriteFile(pinned+".keep", nil, 0o600))
	k.wait(2)
	cluster.remove(custom + "checkpointschedules/often")
	all := k.archives()
	k.checkLeft("the schedule's checkpoints are reduced to the pinned and the newest one", secret, pinned, all[len(all)-1].archive)
	s.checkConsecutive(1, s.waitTicks(c, all[len(all)-1].latest+3))

	before := len(all)
	cluster.apply(custom+"checkpointschedules/drain", "CheckpointSchedule", with(object{"triggers": object{"onKubernetesEvents": []string{"NodeDrain"}}}))
	cluster.apply(nodePath, "Node", object{"metadata": object{}, "spec": object{"unschedulable": true}})
	drained := k.wait(before + 1)[before]
	k.checkLeft("the drain's checkpoint replaces the schedule's", secret, pinned, drained.archive)
	cluster.remove(custom + "checkpointschedules/drain")

	cluster.apply(custom+"forensicsnapshotchains/incident", "ForensicSnapshotChain", with(object{"capture": object{"interval": "1s", "maxSnapshots": 1}}))
	evidence := k.wait(before + 2)[before+1]
	var status struct {
		Phase   string
		Records []struct{ CheckpointPath string } `json:"snapshotChainRecords"`
	}
	if !s.eventually(30*time.Second, func() bool {
		cluster.read(custom+"forensicsnapshotchains/incident", "status", &status)
		return status.Phase == "Completed"
	}) || len(status.Records) != 1 || status.Records[0].CheckpointPath != evidence.archive {
		data, _ := json.Marshal(status)
		s.Errorf("the chain's status is %s", data)
	}
	k.checkLeft("the chain's checkpoint replaces the drain's", secret, pinned, evidence.archive)

	s.check(pod.Remove(s.ctx))
	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(evidence.archive)})
	s.checkContinuesBetween(s.runIn(pod, counterNamed("c")), evidence.earliest, evidence.latest)
	s.check(pod.Remove(s.ctx))

	cluster.remove(podPath)
	limits(false, true)
	k.checkLeft("no archive of a pod that is gone is left but the pinned one, and what the operator cannot read", secret, pinned)
}

// startOperator starts checkpoint-restore-operator as in a pod of a cluster.
func (s *scenario) startOperator(program string, c *cluster) {
	s.Helper()
	program, err := filepath.Abs(program)
	s.check(err)
	dir := s.newDir()
	account, start := filepath.Join(dir, "account"), filepath.Join(dir, "checkpoint-restore-operator")
	c.serviceAccount(account)
	host, port, ok := strings.Cut(strings.TrimPrefix(c.server.URL, "https://"), ":")
	if !ok {
		s.Fatalf("the cluster is at %s", c.server.URL)
	}
	s.check(errors.Join(
		os.WriteFile(start, []byte(inPod), 0o700),
		os.MkdirAll(filepath.Join(dir, "work"), 0o700),
	))
	s.startDaemon(filepath.Join(dir, "work"), start, account,
		"env", "-u", "KUBECONFIG", "KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port,
		program, "--health-probe-bind-address=0", "--metrics-bind-address=0")
}
