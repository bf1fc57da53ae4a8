// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

func baseName(archive string) string { return filepath.Base(archive) }

// fromArchive are the annotations of a pod whose container c starts from an
// archive.
func fromArchive(archive string) map[string]string {
	return map[string]string{"kata-checkpoint.dev/restore.c": baseName(archive)}
}

// checkpointctl runs the program that shows archives.
func (s *scenario) checkpointctl(args ...string) string {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	path, err := p.Checkpointctl(s.ctx)
	s.check(err)
	out, err := exec.CommandContext(s.ctx, path, args...).CombinedOutput()
	if err != nil {
		s.Fatalf("checkpointctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// checkpointRunning has a container checkpointed in passing, and gives the
// numbers between which that was.
func (s *scenario) checkpointRunning(c *cri.Container, archive string) (earliest, latest int) {
	s.Helper()
	last := func() int {
		ticks := s.waitTicks(c, 5)
		return ticks[len(ticks)-1]
	}
	earliest = last()
	s.check(c.Checkpoint(s.ctx, archive))
	latest = last()
	s.step("checkpointed %s", c.Name)
	return earliest, latest
}

// specOf is the specification that containerd has of a container, after all
// that has adjusted it.
func (s *scenario) specOf(c *cri.Container) *oci.Spec {
	s.Helper()
	ctx := namespaces.WithNamespace(s.ctx, testbed.CRINamespace)
	container, err := s.engine.Client.LoadContainer(ctx, c.ID)
	s.check(err)
	spec, err := container.Spec(ctx)
	s.check(err)
	return spec
}

// restoreByAnnotation: an ordinary pod that names an archive continues where
// the archive's container was, and is a pod like any other from there on. A
// container that is started again in it begins afresh.
func restoreByAnnotation(s *scenario) {
	pod := s.runPod("before", cri.PodSpec{})
	c := s.runIn(pod, counterNamed("c"))
	archive := s.archive("c")
	earliest, latest := s.checkpointRunning(c, archive)
	lines, err := c.Lines()
	s.check(err)
	boots := workload.Boots(lines)
	s.check(pod.Remove(s.ctx))

	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(archive)})
	c = s.runIn(pod, counterNamed("c"))
	s.checkContinuesBetween(c, earliest, latest)
	lines, err = c.Lines()
	s.check(err)
	if now := workload.Boots(lines); len(now) != 1 || slices.Equal(now, boots) {
		s.Errorf("restored in the boots %q, after %q", now, boots)
	}
	s.checkInPod(c, "after")
	stats, err := c.Stats(s.ctx)
	s.check(err)
	if stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		s.Errorf("no memory in the stats %v", stats)
	}

	// The next one is of the restored container.
	archive = s.archive("again")
	earliest, latest = s.checkpointRunning(c, archive)
	// A stop and a start in the same pod: nothing is restored twice.
	s.check(c.Stop(s.ctx, 1))
	again := counterNamed("c")
	again.Attempt = 1
	s.checkConsecutive(1, s.waitTicks(s.runIn(pod, again), 3))
	s.check(pod.Remove(s.ctx))

	pod = s.runPod("third", cri.PodSpec{Annotations: fromArchive(archive)})
	c = s.runIn(pod, counterNamed("c"))
	s.checkContinuesBetween(c, earliest, latest)
	s.checkInPod(c, "third")
}

// checkInPod checks what a container sees of its pod: host name, name
// resolution, address.
func (s *scenario) checkInPod(c *cri.Container, pod string) {
	s.Helper()
	address, err := c.Pod().Address(s.ctx)
	s.check(err)
	out, err := c.Exec(s.ctx, "sh", "-c", "hostname; cat /etc/hostname; grep search /etc/resolv.conf; ip -4 -o address show eth0 | awk '{print $4}' | cut -d/ -f1")
	s.check(err)
	if want := []string{pod, pod, "search", pod + ".test", address}; !slices.Equal(strings.Fields(out), want) {
		s.Errorf("the container is in %q, not in %q", strings.Fields(out), want)
	}
	out, err = c.Exec(s.ctx, "sh", "-c", "ps -o pid,args | grep -c 'workload counter'; cat /proc/1/comm")
	s.check(err)
	if !strings.Contains(out, "workload") {
		s.Errorf("an exec sees %q", out)
	}
	s.step("looked around in %s", c.Name)
}

// restoreByAnnotationMissing: a pod whose archive cannot be used fails to start
// its container and says why. Its other containers, and the next one, are not
// touched by that.
func restoreByAnnotationMissing(s *scenario) {
	archive := s.archive("other")
	annotations := fromArchive(archive)
	pod := s.runPod("missing", cri.PodSpec{Annotations: annotations})
	other := s.runIn(pod, counterNamed("other"))
	s.checkpointRunning(other, archive)
	elsewhere := s.archive("text")
	s.check(os.Rename(archive, elsewhere))

	refused := func(want ...string) {
		s.Helper()
		c := counterNamed("c")
		c.Image = parts.WorkloadImageName
		container, err := pod.Run(s.ctx, c)
		if err == nil {
			s.ids = append(s.ids, container.ID)
			s.Fatalf("the container started all the same")
		}
		for _, text := range append(want, "kata-checkpoint.dev/restore.c", "container c") {
			if !strings.Contains(err.Error(), text) {
				s.Errorf("the error does not say %q: %v", text, err)
			}
		}
		s.Logf("refused: %v", err)
	}
	none := "there is no archive " + baseName(archive) + " in " + s.testbed.RestoreDir()
	refused(none, "put it there")
	s.check(os.WriteFile(archive, []byte(strings.Repeat("this is no archive ", 100)), 0o600))
	refused(none)
	s.check(os.Remove(archive))
	s.check(os.Symlink(elsewhere, archive))
	refused(none)
	s.check(os.Remove(archive))
	// One of a container with another command.
	s.check(os.Rename(elsewhere, archive))
	refused("does not fit this container", "/dev/shm/other")

	s.checkConsecutive(1, s.waitTicks(other, len(s.waitTicks(other, 5))+5))
	left, err := s.testbed.Exchanged("*")
	s.check(err)
	for _, path := range left {
		if strings.Contains(path, "archive") || strings.Contains(path, "restore/") {
			s.Errorf("%s is left", path)
		}
	}
	// Another tenant's.
	s.check(pod.Remove(s.ctx))
	pod = s.runPod("stranger", cri.PodSpec{Namespace: "elsewhere", Annotations: annotations})
	refused(none, `in the namespace "elsewhere"`)
}

// changing is a container that changes its root file system and counts.
func changing(name string) cri.ContainerSpec {
	return cri.ContainerSpec{Name: name, Args: []string{"sh", "-c",
		"echo changed >/etc/passwd; echo added >/etc/added; rm /etc/group; chmod 4755 /etc/added; exec " + workload.Path + " counter"}}
}

// rootfsDiffApplied: files that the container has changed, added and removed
// are so after the restore, from the first instruction on.
func rootfsDiffApplied(s *scenario) {
	pod := s.runPod("before", cri.PodSpec{})
	c := s.runIn(pod, changing("c"))
	archive := s.archive("c")
	earliest, latest := s.checkpointRunning(c, archive)
	s.check(pod.Remove(s.ctx))
	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(archive)})
	c = s.runIn(pod, changing("c"))
	s.checkContinuesBetween(c, earliest, latest)
	s.checkChangedFiles(c)
}

// checkChangedFiles checks what a container made by changing has of its files.
// What a file may do does not come from an archive.
func (s *scenario) checkChangedFiles(c *cri.Container) {
	s.Helper()
	out, err := c.Exec(s.ctx, "sh", "-c", "cat /etc/passwd /etc/added; ls /etc/group 2>/dev/null; stat -c %a /etc/added")
	s.check(err)
	if want := []string{"changed", "added", "755"}; !slices.Equal(strings.Fields(out), want) {
		s.Errorf("the restored files are %q, not %q", strings.Fields(out), want)
	}
}

// restoreArchive: up to 2.3, containerd's CRI creates a container from an
// archive, or an image of one, that is named instead of its image.
func restoreArchive(s *scenario) {
	pod := s.runPod("before", cri.PodSpec{})
	c := s.runIn(pod, changing("c"))
	archive := s.archive("c")
	earliest, latest := s.checkpointRunning(c, archive)
	s.check(pod.Remove(s.ctx))

	const image = "checkpoint.test/c:latest"
	layout := filepath.Join(s.newDir(), "image.tar")
	f, err := os.Create(layout)
	s.check(err)
	s.check(errors.Join(parts.WriteCheckpointImage(f, image, "c", archive), f.Close()))
	s.check(s.testbed.Import(s.ctx, layout))
	s.afterContainers(func() error {
		ctx := context.WithoutCancel(s.ctx)
		return errors.Join(s.engine.Client.ImageService().Delete(ctx, image),
			s.engine.Client.ImageService().Delete(namespaces.WithNamespace(ctx, testbed.CRINamespace), image))
	})
	for from, name := range map[string]string{archive: "archived", image: "imaged"} {
		pod = s.runPod(name, cri.PodSpec{})
		spec := changing("c")
		spec.Image = from
		c, err := pod.Run(s.ctx, spec)
		s.check(err)
		s.ids = append(s.ids, c.ID)
		s.step("started a container from %s", from)
		s.checkContinuedLog(c, earliest, latest)
		s.checkChangedFiles(c)
		s.checkInPod(c, name)
		s.check(pod.Remove(s.ctx))
	}
}

// checkContinuedLog checks a restored counter whose log begins with the old
// one, which containerd has copied after the container was resumed: what was
// printed between checkpoint and copy comes twice.
func (s *scenario) checkContinuedLog(c *cri.Container, earliest, latest int) {
	s.Helper()
	ticks := s.waitTicks(c, latest+5)
	again := 1
	for again < len(ticks) && ticks[again] == ticks[again-1]+1 {
		again++
	}
	if again < len(ticks) {
		if at := ticks[again] - 1; at < earliest || at > latest {
			s.Errorf("the container continues after %d, and was checkpointed between %d and %d", at, earliest, latest)
		}
		s.checkConsecutive(ticks[again], ticks[again:])
	}
	s.checkConsecutive(1, ticks[:again])
}

// archiveHasNoAuthority: whatever is in an archive, the restored container has
// the mounts, annotations, devices and rights of its pod, and the node's files
// are as they were.
func archiveHasNoAuthority(s *scenario) {
	pod := s.runPod("before", cri.PodSpec{})
	c := s.runIn(pod, counterNamed("c"))
	archive := s.archive("c")
	earliest, latest := s.checkpointRunning(c, archive)
	s.check(pod.Remove(s.ctx))
	secret := filepath.Join(s.newDir(), "secret")
	s.check(os.WriteFile(secret, []byte("the node's own"), 0o600))

	forged := s.archive("forged")
	escape := strings.Repeat("../", 20) + "tmp/" + filepath.Base(s.archive("escaped"))
	s.check(forge(archive, forged, secret, escape))
	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(forged)})
	c = s.runIn(pod, counterNamed("c"))
	s.checkContinuesBetween(c, earliest, latest)
	spec := s.specOf(c)
	for _, m := range spec.Mounts {
		if strings.Contains(m.Source, "secret") || m.Destination == "/stolen" {
			s.Errorf("the container has the mount %v", m)
		}
	}
	for key, value := range spec.Annotations {
		if strings.HasPrefix(key, "cdi.") || strings.Contains(value, "forged/") {
			s.Errorf("the container has the annotation %s: %s", key, value)
		}
	}
	out, err := c.Exec(s.ctx, "sh", "-c", "ls /stolen /dev/stolen /etc/device 2>/dev/null; stat -c %a /bin/forged; cat /link 2>/dev/null; id -u; grep CapEff /proc/1/status")
	s.check(err)
	if strings.Contains(out, "stolen") || strings.Contains(out, "device") || strings.Contains(out, "the node's own") {
		s.Errorf("the container has what the archive gave it: %s", out)
	}
	if !strings.HasPrefix(out, "755\n") {
		s.Errorf("a set-user-ID file of the archive's is not plain: %s", out)
	}
	for _, path := range []string{filepath.Join("/", strings.TrimLeft(escape, "./"))} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			s.Errorf("the archive has written %s on the node (%v)", path, err)
		}
	}
	s.check(pod.Remove(s.ctx))

	// Processes that could do more than the pod's container.
	pod = s.runPod("mighty", cri.PodSpec{})
	mighty := counterNamed("c")
	mighty.Capabilities = []string{"SYS_ADMIN"}
	more := s.archive("mighty")
	s.checkpointRunning(s.runIn(pod, mighty), more)
	s.check(pod.Remove(s.ctx))
	pod = s.runPod("modest", cri.PodSpec{Annotations: fromArchive(more)})
	modest := counterNamed("c")
	modest.Image = parts.WorkloadImageName
	if _, err := pod.Run(s.ctx, modest); err == nil || !strings.Contains(err.Error(), "it had CAP_SYS_ADMIN, which this container lacks") {
		s.Errorf("processes with a capability that the pod does not give: error %v", err)
	}
	s.checkContinuesBetween(s.runIn(pod, withAttempt(mighty, 1)), 1, 1<<30)
	s.check(pod.Remove(s.ctx))

	// What no trusted node has signed is not restored in a pod.
	for name, tc := range map[string]struct {
		edit func(h *tar.Header, data []byte) (*tar.Header, []byte)
		want string
	}{
		"changed": {func(h *tar.Header, data []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, imageset.ManifestName) {
				data = append(data, '\n')
			}
			return h, data
		}, "its signature is not that of its manifest"},
		"unsigned": {func(h *tar.Header, data []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, imageset.SignatureName) {
				h.Name = "elsewhere"
			}
			return h, data
		}, "it is not signed"},
	} {
		forged = s.archive(name)
		s.check(rewrite(archive, forged, tc.edit))
		pod = s.runPod(name, cri.PodSpec{Annotations: fromArchive(forged)})
		unsigned := counterNamed("c")
		unsigned.Image = parts.WorkloadImageName
		if _, err := pod.Run(s.ctx, unsigned); err == nil || !strings.Contains(err.Error(), tc.want) {
			s.Errorf("an archive that is %s: error %v", name, err)
		}
		s.check(pod.Remove(s.ctx))
	}

	// Among the images themselves nothing but regular files is taken.
	linked := s.archive("linked")
	s.check(rewrite(archive, linked, func(h *tar.Header, data []byte) (*tar.Header, []byte) {
		if strings.HasSuffix(h.Name, "inventory.img") {
			return &tar.Header{Name: h.Name, Typeflag: tar.TypeSymlink, Linkname: secret}, nil
		}
		return h, data
	}))
	pod = s.runPod("linked", cri.PodSpec{Annotations: fromArchive(linked)})
	again := counterNamed("c")
	again.Image = parts.WorkloadImageName
	if _, err := pod.Run(s.ctx, again); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		s.Errorf("a symlink for an image: error %v", err)
	}
}

// withAttempt is a container as it is started again in its pod.
func withAttempt(c cri.ContainerSpec, attempt uint32) cri.ContainerSpec {
	c.Attempt = attempt
	return c
}

// forge makes an archive that asks for everything, with the same processes in
// it.
func forge(from, to, secret, escape string) error {
	return rewrite(from, to, func(h *tar.Header, data []byte) (*tar.Header, []byte) {
		switch strings.TrimPrefix(h.Name, "./") {
		case "spec.dump":
			var spec specs.Spec
			if json.Unmarshal(data, &spec) == nil {
				spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/stolen", Type: "bind", Source: secret, Options: []string{"rbind", "rw"}})
				spec.Annotations["cdi.k8s.io/forged"] = "forged/device=all"
				spec.Process.User = specs.User{UID: 0}
				spec.Process.Capabilities = &specs.LinuxCapabilities{Effective: []string{"CAP_SYS_ADMIN"}, Permitted: []string{"CAP_SYS_ADMIN"}}
				spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: "/dev/stolen", Type: "b", Major: 8})
				data, _ = json.Marshal(&spec)
			}
		case "rootfs-diff.tar":
			data = forgedDiff(data, secret, escape)
		}
		return h, data
	}, &tar.Header{Name: "stolen", Typeflag: tar.TypeSymlink, Linkname: secret}, &tar.Header{Name: escape, Typeflag: tar.TypeReg},
		&tar.Header{Name: "device", Typeflag: tar.TypeBlock, Devmajor: 8})
}

// forgedDiff adds to the changes of a root file system what would give rights,
// or leave it.
func forgedDiff(data []byte, secret, escape string) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if stream, err := compression.DecompressStream(bytes.NewReader(data)); err == nil {
		for r := tar.NewReader(stream); ; {
			h, err := r.Next()
			if err != nil {
				break
			}
			_ = w.WriteHeader(h)
			_, _ = io.Copy(w, r)
		}
	}
	for _, h := range []*tar.Header{
		{Name: "bin/forged", Typeflag: tar.TypeReg, Mode: 0o4755}, {Name: "etc/device", Typeflag: tar.TypeBlock, Devmajor: 8, Mode: 0o666},
		{Name: "link", Typeflag: tar.TypeSymlink, Linkname: secret}, {Name: escape, Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "/tmp"}, {Name: "out/" + filepath.Base(escape), Typeflag: tar.TypeReg, Mode: 0o644},
	} {
		_ = w.WriteHeader(h)
	}
	_ = w.Close()
	return out.Bytes()
}

// rewrite copies an archive, each entry as edit has it, with more entries at
// its end.
func rewrite(from, to string, edit func(*tar.Header, []byte) (*tar.Header, []byte), more ...*tar.Header) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	w := tar.NewWriter(out)
	for r := tar.NewReader(in); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if h, data = edit(h, data); h.Typeflag == tar.TypeReg {
			h.Size = int64(len(data))
		}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
	}
	for _, h := range more {
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	return w.Close()
}
