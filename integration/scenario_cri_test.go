// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// podNamespace is the Kubernetes namespace of the scenarios' pods.
const podNamespace = "shop"

// runPod starts a pod with the CRI's client.
func (s *scenario) runPod(name string, p cri.PodSpec) *cri.Pod {
	s.Helper()
	return s.runPodWith(s.testbed.cri, name, p)
}

func (s *scenario) runPodWith(client *cri.Client, name string, p cri.PodSpec) *cri.Pod {
	s.Helper()
	p.Name, p.UID = name, fmt.Sprintf("%x", random(16))
	if p.Namespace == "" {
		p.Namespace = podNamespace
	}
	pod, err := client.RunPod(s.ctx, p)
	s.check(err)
	s.pods = append(s.pods, pod)
	s.ids = append(s.ids, pod.ID)
	s.testbed.ids = append(s.testbed.ids, pod.ID)
	s.step("started pod %s", name)
	return pod
}

// runIn starts a container of the workload image in a pod.
func (s *scenario) runIn(pod *cri.Pod, c cri.ContainerSpec) *cri.Container {
	s.Helper()
	c.Image = parts.WorkloadImageName
	container, err := pod.Run(s.ctx, c)
	s.check(err)
	s.ids = append(s.ids, container.ID)
	s.testbed.ids = append(s.testbed.ids, container.ID)
	s.step("started container %s", c.Name)
	return container
}

func counterNamed(name string) cri.ContainerSpec {
	return cri.ContainerSpec{Name: name, Args: []string{workload.Path, "counter", "--shm", "/dev/shm/" + name}}
}

// waitTicks waits until a container has counted n times, and gives all its
// numbers by then.
func (s *scenario) waitTicks(c *cri.Container, n int) []int {
	s.Helper()
	var ticks []int
	s.check(c.Wait(s.ctx, func(lines []string) (bool, error) {
		var err error
		ticks, err = workload.Ticks(lines)
		return len(ticks) >= n, err
	}))
	return ticks
}

// archive is a path for a checkpoint, in the directory that pods can be
// restored from.
func (s *scenario) archive(name string) string {
	s.Helper()
	dir := s.testbed.RestoreDir()
	s.check(os.MkdirAll(dir, 0o700))
	path := filepath.Join(dir, s.fileName()+"-"+name+".tar")
	s.afterContainers(func() error { return os.RemoveAll(path) })
	return path
}

// crictl runs the CRI's command line client.
func (s *scenario) crictl(args ...string) string {
	s.Helper()
	cmd := exec.CommandContext(s.ctx, "crictl", append([]string{"--timeout", "5m"}, args...)...)
	for dir := range strings.SplitSeq(s.testbed.Path, ":") {
		if path := filepath.Join(dir, "crictl"); exec.Command(path, "--version").Run() == nil {
			cmd.Path, cmd.Err = path, nil
			break
		}
	}
	cmd.Env = append(os.Environ(), "CONTAINER_RUNTIME_ENDPOINT=unix://"+s.testbed.Address, "IMAGE_SERVICE_ENDPOINT=unix://"+s.testbed.Address)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.Fatalf("crictl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	s.step("crictl %s", strings.Join(args, " "))
	return string(out)
}

// archiveEntries lists what is in an archive.
func (s *scenario) archiveEntries(archive string) []string {
	s.Helper()
	f, err := os.Open(archive)
	s.check(err)
	defer f.Close()
	var names []string
	for r := tar.NewReader(f); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		s.check(err)
		names = append(names, strings.TrimPrefix(header.Name, "./"))
	}
}

// crictlCheckpoint: `crictl checkpoint` writes an archive, and the container
// keeps running. The CRIU that containerd asks for is the guest bundle's.
func crictlCheckpoint(s *scenario) {
	if other, err := exec.LookPath("criu"); err == nil {
		s.Logf("there is a CRIU of the machine's own, %s: that the guest bundle's serves is not shown", other)
	}
	pod := s.runPod("counter", cri.PodSpec{})
	c := s.runIn(pod, counterNamed("c"))
	s.waitTicks(c, 5)
	for n := range 2 { // of one that was checkpointed before, too
		archive := s.archive(fmt.Sprint(n))
		s.crictl("checkpoint", "--export="+archive, c.ID)
		at := s.waitTicks(c, 5)
		s.checkConsecutive(1, s.waitTicks(c, len(at)+5))
		have := s.archiveEntries(archive)
		for _, want := range []string{"config.dump", "spec.dump", "rootfs-diff.tar", "checkpoint/kata-checkpoint.json", "checkpoint/inventory.img", "dump.log", "stats-dump"} {
			if !slices.Contains(have, want) {
				s.Errorf("there is no %s in the archive, but %q", want, have)
			}
		}
	}
	out, err := c.Exec(s.ctx, "sh", "-c", "ls -a /; cat /proc/self/mountinfo")
	s.check(err)
	if strings.Contains(out, "kata-checkpoint") {
		s.Errorf("the container sees the exchange mount: %s", out)
	}
}
