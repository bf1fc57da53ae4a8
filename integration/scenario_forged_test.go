// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// forgery is what the author of an image set may give to its processes, and the
// words with which a restore is refused into a container that has less.
type forgery struct {
	name  string
	do    func(dir string) error
	words []string
}

var forgeries = []forgery{
	{"a capability", forgeCreds(func(c *creds.CredsEntry) {
		c.CapPrm[0], c.CapEff[0], c.CapBnd[0] = c.CapPrm[0]|1<<unix.CAP_SYS_ADMIN, c.CapEff[0]|1<<unix.CAP_SYS_ADMIN, c.CapBnd[0]|1<<unix.CAP_SYS_ADMIN
	}), []string{"process workload (PID 1) has the capability CAP_SYS_ADMIN, which the container does not", "CAP_SYS_ADMIN in its bounding set"}},
	{"a capability of the bounding set", forgeCreds(func(c *creds.CredsEntry) {
		c.CapPrm[0], c.CapEff[0] = c.CapPrm[0]|1<<unix.CAP_SETUID, c.CapEff[0]|1<<unix.CAP_SETUID
	}), []string{"has the capability CAP_SETUID, which the container does not"}},
	{"a capability of a thread", forgeCores(func(c *criu_core.CoreEntry) {
		if c.Tc == nil { // not the main one
			c.ThreadCore.Creds.CapPrm[0], c.ThreadCore.Creds.CapEff[0] = 1<<unix.CAP_CHOWN, 1<<unix.CAP_CHOWN
		}
	}), []string{"has the capability CAP_CHOWN, which the container does not"}},
	{"no no_new_privs", forgeCreds(func(c *creds.CredsEntry) { dropUnknown(c, noNewPrivs) }), []string{"lacks no_new_privs"}},
	{"another user", forgeCreds(func(c *creds.CredsEntry) {
		c.Uid, c.Euid, c.Suid, c.Fsuid = proto.Uint32(0), proto.Uint32(0), proto.Uint32(0), proto.Uint32(0)
	}), []string{"has the user 0, which the container cannot become"}},
	{"another group", forgeCreds(func(c *creds.CredsEntry) { c.Egid, c.Groups = proto.Uint32(6), []uint32{0, 6} }),
		[]string{"has the group 6, which", "has the group 0, which"}},
	{"a limit", forgeCores(func(c *criu_core.CoreEntry) {
		for _, l := range c.GetTc().GetRlimits().GetRlimits() {
			l.Max = proto.Uint64(1 << 20)
		}
	}), []string{"has the limit NOFILE 1048576, and the container 1024", "has the limit NICE 1048576, and the container 0"}},
	{"an oom_score_adj", forgeCores(func(c *criu_core.CoreEntry) {
		if c.Tc != nil {
			c.Tc.OomScoreAdj = proto.Int32(-999)
		}
	}), []string{"has the oom_score_adj -999, and the container 100"}},
	{"a priority", forgeCores(func(c *criu_core.CoreEntry) { c.ThreadCore.SchedNice = proto.Int32(-20) }), []string{"has the nice value -20"}},
	{"a writable /proc/sys", forgeMounts(func(m *mnt.MntEntry) bool {
		if m.GetMountpoint() == "/proc/sys" {
			m.Flags = proto.Uint32(m.GetFlags() &^ unix.MS_RDONLY)
		}
		return true
	}), []string{"has /proc/sys without ro, unlike the container"}},
	{"no mask", forgeMounts(func(m *mnt.MntEntry) bool { return m.GetMountpoint() != "/proc/kcore" }),
		[]string{"sees /proc/kcore, which the container does not"}},
	{"a disk in /dev", forgeTmpfs(&tar.Header{Name: "./disk", Typeflag: tar.TypeBlock, Mode: 0o666, Devmajor: 254}),
		[]string{"has a node of the device 254:0 in /dev, and the container has none"}},
	{"a second /proc", forgeMounts(func(m *mnt.MntEntry) bool {
		if m.GetMountpoint() == "/dev/mqueue" {
			*m.Fstype, *m.Source, *m.Root = uint32(mnt.Fstype_PROC), "proc", "/"
		}
		return true
	}), []string{"has a file system of the type proc mounted at /dev/mqueue"}},
}

// noNewPrivs is the number of a field of CredsEntry that go-criu does not know
// (images/creds.proto).
const noNewPrivs = 18

// forgedImages: whatever an image set says that its processes have, in a container
// that has less nothing of it runs, and the refusal names the process and what it
// has.
func forgedImages(s *scenario) {
	s.configure("restore_unsigned", true) // the forgeries are
	pod := s.startPod()
	const shm = "/dev/shm/forged"
	c := pod.create(engine.Container{
		ID: "c", Args: []string{workload.Path, "counter", "--file", shm + "-file", "--shm", shm},
		Spec: []oci.SpecOpts{oci.WithUIDGID(1000, 1000), oci.WithNoNewPrivileges, func(_ context.Context, _ oci.Client, _ *containers.Container, spec *oci.Spec) error {
			spec.Process.OOMScoreAdj = new(int)
			*spec.Process.OOMScoreAdj = 100
			return nil
		}},
	})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	root := s.shellInGuest(pod, "for d in /run/kata-containers /run/kata-containers/shared/containers /run/kata-containers/shared/containers/passthrough; do ls -d $d/"+c.ID()+"/rootfs/ 2>/dev/null; done | head -n 1")
	good := s.checkpoint(first, true)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	// A checkpoint may be in the middle of a round.
	counted := func() string { return s.shellInGuest(pod, "cat "+guestShm+strings.TrimPrefix(shm, "/dev/shm")) }
	last := counted()

	forge := func(f forgery, dir string) {
		s.check(os.CopyFS(dir, os.DirFS(good)))
		s.check(f.do(dir))
		s.check(renewDigests(dir))
	}
	// Who changes an image set has no key to sign it with, and can only leave the
	// signature as it is, or out.
	signed := s.newDir()
	forge(forgeries[0], signed)
	if _, err := s.engine.Restore(s.ctx, c, signed); err == nil || !strings.Contains(err.Error(), imageset.ErrForged.Error()) {
		s.Fatalf("with the signature of another manifest: error %v", err)
	}

	guest := s.shellInGuest(pod, guestState)
	inCRIUs := forgery{"the mount namespace of CRIU", forgeMountNamespace(strings.TrimSpace(root)), []string{"process workload (PID 1) has the file system", "mounted at /,"}}
	for _, f := range append(forgeries, inCRIUs) {
		bad := s.newDir()
		forge(f, bad)
		s.check(os.Remove(filepath.Join(bad, imageset.SignatureName)))
		if _, err := s.engine.Restore(s.ctx, c, bad); err == nil {
			s.Errorf("with %s it was restored", f.name)
			s.check(s.engine.EndTask(s.ctx, c))
		} else {
			s.Logf("with %s: %v", f.name, err)
			for _, word := range f.words {
				if !strings.Contains(err.Error(), word) {
					s.Errorf("with %s the refusal does not say %q: %v", f.name, word, err)
				}
			}
		}
		// A round that was begun would have counted.
		if have := counted(); have != last {
			s.Errorf("with %s the processes have run: they have counted from %s to %s", f.name, last, have)
		}
		if have := s.shellInGuest(pod, guestState); have != guest {
			s.Errorf("with %s the guest has changed: from\n%s\nto\n%s", f.name, guest, have)
		}
	}
	s.step("refused %d image sets", len(forgeries)+1)

	restored := s.restore(c, good)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.checkStatus(restored, client.Running)
}

// guestState prints what a restore that was refused may leave in a guest:
// processes, cgroups, mounts and directories of operations. The root file system
// of the container is the engine's.
const guestState = `
	for p in /proc/[0-9]*; do cat $p/comm 2>/dev/null | grep -x -e workload -e criu -e kata-checkpoint; done | sort
	find /sys/fs/cgroup -name restored
	cut -d ' ' -f 4- /proc/self/mountinfo | grep -v -- '-c/rootfs ' | sort
	ls /run/kata-checkpoint/ops`

// guestShm is where a guest has the /dev/shm of its containers.
const guestShm = "/run/kata-containers/sandbox/shm"

// forgeMountNamespace has the processes be in the mount namespace that CRIU itself
// is in, for which no mounts are in the images. The files that they have open and
// mapped are below root, where the guest has them, but for its own /dev and /proc.
func forgeMountNamespace(root string) func(string) error {
	return func(dir string) error {
		var own uint32
		err := forgeEntries(filepath.Join(dir, "inventory.img"), 4, func(i *inventory.InventoryEntry) bool {
			own = i.GetRootIds().GetMntNsId()
			return true
		})
		if err != nil {
			return err
		}
		err = forgeAll(filepath.Join(dir, "ids-*.img"), func(ids *criu_core.TaskKobjIdsEntry) bool {
			ids.MntNsId = &own
			return true
		})
		if err != nil {
			return err
		}
		return forgeAll(filepath.Join(dir, "files.img"), func(f *fdinfo.FileEntry) bool {
			r := f.GetReg()
			if inShm, ok := strings.CutPrefix(r.GetName(), "/dev/shm/"); ok {
				r.Name = proto.String(filepath.Join(guestShm, inShm)) // a round was in progress
			} else if r != nil && !strings.HasPrefix(r.GetName(), "/dev/") && !strings.HasPrefix(r.GetName(), "/proc/") {
				r.Name = proto.String(filepath.Join(root, r.GetName()))
			}
			return true
		})
	}
}

func forgeCores(change func(*criu_core.CoreEntry)) func(string) error {
	return func(dir string) error {
		return forgeAll(filepath.Join(dir, "core-*.img"), func(c *criu_core.CoreEntry) bool {
			change(c)
			return true
		})
	}
}

func forgeCreds(change func(*creds.CredsEntry)) func(string) error {
	return forgeCores(func(c *criu_core.CoreEntry) { change(c.GetThreadCore().GetCreds()) })
}

func forgeMounts(change func(*mnt.MntEntry) bool) func(string) error {
	return func(dir string) error { return forgeAll(filepath.Join(dir, "mountpoints-*.img"), change) }
}

// forgeTmpfs adds a file to each tmpfs.
func forgeTmpfs(h *tar.Header) func(string) error {
	return func(dir string) error {
		found, err := filepath.Glob(filepath.Join(dir, "tmpfs-*.tar.gz.img"))
		if err == nil && len(found) == 0 {
			err = errors.New("there is no image of a tmpfs")
		}
		for _, path := range found {
			err = errors.Join(err, addToTar(path, h))
		}
		return err
	}
}

func addToTar(path string, h *tar.Header) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	var out bytes.Buffer
	zipped := gzip.NewWriter(&out)
	from, to := tar.NewReader(unzipped), tar.NewWriter(zipped)
	for {
		entry, err := from.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = to.WriteHeader(entry)
		}
		if err == nil {
			_, err = io.Copy(to, from)
		}
		if err != nil {
			return fmt.Errorf("change %s: %w", filepath.Base(path), err)
		}
	}
	if err := errors.Join(to.WriteHeader(h), to.Close(), zipped.Close()); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o600)
}

// dropUnknown removes a field that go-criu does not know.
func dropUnknown(m proto.Message, field protowire.Number) {
	var kept []byte
	for rest := m.ProtoReflect().GetUnknown(); len(rest) > 0; {
		number, _, n := protowire.ConsumeField(rest)
		if n < 0 {
			break
		}
		if number != field {
			kept = append(kept, rest[:n]...)
		}
		rest = rest[n:]
	}
	m.ProtoReflect().SetUnknown(kept)
}

// forgeAll changes the entries of images.
func forgeAll[T any, M interface {
	*T
	proto.Message
}](pattern string, change func(M) bool) error {
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("no image is named %s", filepath.Base(pattern))
	}
	changed := false
	for _, path := range found {
		before, rerr := os.ReadFile(path)
		err = errors.Join(err, rerr, forgeEntries(path, 8, change))
		after, rerr := os.ReadFile(path)
		err = errors.Join(err, rerr)
		changed = changed || !bytes.Equal(before, after)
	}
	if err == nil && !changed {
		err = fmt.Errorf("no image named %s has what is to be changed", filepath.Base(pattern))
	}
	return err
}

// forgeEntries changes the entries of an image whose head has so many bytes, and
// leaves out those for which change returns false.
func forgeEntries[T any, M interface {
	*T
	proto.Message
}](path string, head int, change func(M) bool) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	out := bytes.Clone(data[:head])
	for rest := data[head:]; len(rest) > 0; {
		size := binary.LittleEndian.Uint32(rest)
		entry := M(new(T))
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(rest[4:4+size], entry); err != nil {
			return fmt.Errorf("read %s: %w", filepath.Base(path), err)
		}
		rest = rest[4+size:]
		if !change(entry) {
			continue
		}
		changed, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(entry)
		if err != nil {
			return err
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(changed))), changed...)
	}
	return os.WriteFile(path, out, 0o600)
}

// renewDigests makes the manifest of an image set fit its files.
func renewDigests(dir string) error {
	return changeManifest(dir, func(m map[string]any) {
		for _, f := range m["files"].([]any) {
			file := f.(map[string]any)
			data, err := os.ReadFile(filepath.Join(dir, file["name"].(string)))
			if err != nil {
				continue // Open complains
			}
			sum := sha256.Sum256(data)
			file["size"], file["sha256"] = len(data), hex.EncodeToString(sum[:])
			delete(file, "blake3")
		}
	})
}
