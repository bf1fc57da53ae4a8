// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
)

func writeMounts(t *testing.T, path string, mounts ...*mnt.MntEntry) {
	t.Helper()
	for _, m := range mounts {
		m.Fstype, m.Flags, m.Source, m.Options = proto.Uint32(0), proto.Uint32(0), proto.String(""), proto.String("")
		if m.Root == nil {
			m.Root = proto.String("/")
		}
	}
	image := &entriesImage{magic: binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, imageMagic), mountsMagic)}
	for _, m := range mounts {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		image.entries = append(image.entries, data)
	}
	if err := image.write(path); err != nil {
		t.Fatal(err)
	}
}

func mountEntry(id, parent, device uint32, point string) *mnt.MntEntry {
	return &mnt.MntEntry{MntId: proto.Uint32(id), ParentMntId: proto.Uint32(parent), RootDev: proto.Uint32(device), Mountpoint: proto.String(point)}
}

// Lists in files whose order by number is not that by name.
func TestMountPointsThatTheNewContainerLacks(t *testing.T) {
	dir := t.TempDir()
	name := func(path string) string { return filepath.Join(dir, path) }
	for _, path := range []string{"there", "volume/there"} {
		if err := os.MkdirAll(name(path), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	volume := mountEntry(3, 2, 8, name("volume"))
	volume.ExtKey = proto.String("volume")
	other := mountEntry(4, 2, 8, name("other volume")) // another check's concern
	other.ExtMount = proto.Bool(true)
	shm := mountEntry(17, 2, 9, "/dev/shm")
	shm.ExtKey = proto.String("shm")
	bound := mountEntry(7, 2, 7, name("there"))
	bound.Root = proto.String("/elsewhere")
	images := t.TempDir()
	writeMounts(t, filepath.Join(images, "mountpoints-9.img"),
		mountEntry(2, 1, 7, "/"), volume, other, shm, mountEntry(18, 17, 30, "/dev/shm/comes with the image set"),
		mountEntry(5, 2, 20, name("there")),
		mountEntry(6, 5, 21, name("there/on what is made")),
		bound, mountEntry(8, 7, 22, name("there/on what is bound")),
		mountEntry(9, 2, 23, name("lacking")),
		mountEntry(10, 3, 24, name("volume/there")),
		mountEntry(11, 3, 25, name("volume/lacking")),
	)
	writeMounts(t, filepath.Join(images, "mountpoints-11.img"), // unshare -m
		mountEntry(12, 1, 7, "/"), mountEntry(13, 12, 26, name("there")), mountEntry(14, 12, 27, name("lacking in a namespace")))
	writeMounts(t, filepath.Join(images, "mountpoints-12.img"), // with pivot_root
		mountEntry(15, 1, 28, "/"), mountEntry(16, 15, 29, name("in its own root")))
	tree, err := inside.Open(os.Getpid(), func(*mountinfo.Info) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	err = checkMountPoints(images, tree)
	want := strings.Join([]string{name("lacking"), name("lacking in a namespace"), name("volume/lacking")}, ", ")
	if errcode.Of(err) != errcode.NoMountPoint || !strings.Contains(err.Error(), "at "+want+", which") {
		t.Errorf("error %v, not one about %s", err, want)
	}
	for _, path := range []string{"lacking", "lacking in a namespace", "volume/lacking"} {
		if err := os.Mkdir(name(path), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkMountPoints(images, tree); err != nil {
		t.Errorf("with all of them there is the error %v", err)
	}
}
