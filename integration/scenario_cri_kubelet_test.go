// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// kubeletConfig is for a kubelet without a cluster: its pods are files. Of the
// machine it manages nothing.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
address: 127.0.0.1
port: %[1]d
healthzPort: 0
readOnlyPort: 0
staticPodPath: %[2]s/manifests
podLogsDir: %[2]s/logs
containerRuntimeEndpoint: unix://%[3]s
fileCheckFrequency: 1s
failSwapOn: false
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
`

// kubelet is a running one.
type kubelet struct {
	s       *scenario
	dir     string
	address string
	http    *http.Client
}

// startKubelet starts one on the testbed's containerd, until the scenario's
// end.
func (s *scenario) startKubelet(program string) *kubelet {
	s.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	s.check(err)
	port := l.Addr().(*net.TCPAddr).Port
	s.check(l.Close())
	k := &kubelet{
		s: s, dir: filepath.Join(s.testbed.Dir, "kubelet"), address: fmt.Sprintf("https://127.0.0.1:%d", port),
		// Its certificate is its own.
		http: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}},
	}
	s.check(os.MkdirAll(filepath.Join(k.dir, "manifests"), 0o755))
	config := filepath.Join(k.dir, "config.yaml")
	s.check(os.WriteFile(config, fmt.Appendf(nil, kubeletConfig, port, k.dir, s.testbed.Address), 0o644))
	s.startDaemon(k.dir, program, "--config", config, "--root-dir", k.dir, "--cert-dir", filepath.Join(k.dir, "pki"), "--hostname-override", "node")
	if !s.eventually(time.Minute, func() bool {
		_, err := k.get("/pods")
		return err == nil
	}) {
		s.Fatalf("the kubelet does not serve")
	}
	s.step("the kubelet serves at %s", k.address)
	return k
}

func (k *kubelet) get(path string) ([]byte, error) {
	return k.answer(k.http.Get(k.address + path))
}

func (k *kubelet) answer(r *http.Response, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	data, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", r.Status, data)
	}
	return data, err
}

// run has the kubelet run a pod with a counter, the container c.
func (k *kubelet) run(name string, annotations map[string]string) {
	k.s.Helper()
	manifest, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "annotations": annotations},
		"spec": map[string]any{"terminationGracePeriodSeconds": 1, "containers": []any{map[string]any{
			"name": "c", "image": parts.WorkloadImageName, "imagePullPolicy": "Never", "command": []string{workload.Path, "counter"},
		}}},
	})
	k.s.check(err)
	// Beside the directory first: the kubelet reads what it finds.
	path := filepath.Join(k.dir, "manifests", name+".json")
	k.s.check(os.WriteFile(path+".new", manifest, 0o644))
	k.s.check(os.Rename(path+".new", path))
}

// remove has the kubelet remove a pod, and waits until it has.
func (k *kubelet) remove(name string) {
	k.s.Helper()
	k.s.check(os.Remove(filepath.Join(k.dir, "manifests", name+".json")))
	if !k.s.eventually(time.Minute, func() bool {
		left, _ := filepath.Glob(filepath.Join(k.dir, "logs/*_"+name+"-node_*"))
		data, err := k.get("/pods")
		return err == nil && !strings.Contains(string(data), name+"-node") && len(left) == 0
	}) {
		k.s.Errorf("the pod %s is not removed", name)
	}
	k.s.step("removed pod %s", name)
}

// ticks are what the pod's counter has printed.
func (k *kubelet) ticks(name string, n int) []int {
	k.s.Helper()
	var ticks []int
	if !k.s.eventually(2*time.Minute, func() bool {
		logs, _ := filepath.Glob(filepath.Join(k.dir, "logs/*_"+name+"-node_*/c/0.log"))
		if len(logs) != 1 {
			return false
		}
		data, err := os.ReadFile(logs[0])
		k.s.check(err)
		lines, err := cri.ParseLog(string(data))
		k.s.check(err)
		ticks, err = workload.Ticks(lines)
		k.s.check(err)
		return len(ticks) >= n
	}) {
		k.s.Fatalf("pod %s has counted %v", name, ticks)
	}
	return ticks
}

// kubeletCheckpointAPI: the kubelet's API writes an archive of a container that
// keeps running, and a pod that the kubelet then runs continues from it.
func kubeletCheckpointAPI(s *scenario) {
	p, err := parts.Find()
	s.check(err)
	if !p.HaveKubelet() {
		s.Skip("there is no kubelet: `make kubelet` builds one, which takes ten minutes")
	}
	program, err := p.Kubelet(s.ctx)
	s.check(err)
	k := s.startKubelet(program)
	k.run("before", nil)
	earliest := len(k.ticks("before", 5))
	s.step("the kubelet runs a pod")

	answer, err := k.answer(k.http.Post(k.address+"/checkpoint/default/before-node/c", "", nil))
	s.check(err)
	var archives struct {
		Items []string `json:"items"`
	}
	s.check(json.Unmarshal(answer, &archives))
	if len(archives.Items) != 1 {
		s.Fatalf("the kubelet answers %s", answer)
	}
	latest := len(k.ticks("before", 1))
	s.checkConsecutive(1, k.ticks("before", latest+5))
	s.step("checkpointed to %s", archives.Items[0])
	k.remove("before")

	archive := s.archive("c")
	s.check(os.Rename(archives.Items[0], archive))
	k.run("after", fromArchive(archive))
	after := k.ticks("after", 5)
	if at := after[0] - 1; at < earliest || at > latest {
		s.Errorf("the restored counter continues after %d, and was checkpointed between %d and %d", at, earliest, latest)
	}
	s.checkConsecutive(after[0], after)
	s.step("the kubelet runs a pod from the archive")
	k.remove("after")
}
