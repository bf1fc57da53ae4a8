// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// entries is an image of messages.
func entries(t testing.TB, magic uint32, list ...proto.Message) []byte {
	t.Helper()
	out := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, imageMagic), magic)
	for _, m := range list {
		data, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(data))), data...)
	}
	return out
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Of an image set that is accepted, CRIU finds credentials in each image of a
// thread but those of zombies.
func FuzzCredentials(f *testing.F) {
	good := image(f, "work", &creds.CredsEntry{})
	f.Add(good, tree(f, map[uint32][]uint32{1: {1}}))
	f.Add(good[:12], tree(f, nil))
	f.Add(append(bytes.Clone(good[:8]), 0xff, 0xff, 0xff, 0xff), []byte(nil))
	f.Fuzz(func(t *testing.T, core, processes []byte) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "core-1.img"), core)
		write(t, filepath.Join(dir, "pstree.img"), processes)
		if checkCredentials(dir) != nil {
			return
		}
		read, err := readCore(filepath.Join(dir, "core-1.img"))
		if err != nil {
			t.Fatal(err)
		}
		if read.GetThreadCore().GetCreds() != nil || read.GetTc().GetTaskState() == taskDead {
			return
		}
		t.Error("an image without credentials is accepted")
	})
}

// An image is written as it was read, and only what is edited changes.
func FuzzEditImage(f *testing.F) {
	f.Add(entries(f, 7, timerEntry(1, 0, 5), regEntry(3, "/data/f")))
	f.Add(entries(f, 7)[:5])
	f.Add(append(entries(f, 7), 0xff, 0xff, 0xff, 0x7f, 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), filesImage)
		write(t, path, data)
		image, err := readEntries(path)
		if err != nil {
			return
		}
		if err := image.write(path); err != nil {
			t.Fatal(err)
		}
		if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, data) {
			t.Errorf("%q is written as %q, %v", data, again, err)
		}
		if err := editImage(path, func(*fdinfo.FileEntry) bool { return false }); err != nil {
			return
		}
		if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, data) {
			t.Errorf("%q has become %q, %v", data, again, err)
		}
	})
}

// What is mended can be read, has as many files as before, and no periodic timer
// that would never tick again.
func FuzzMendImages(f *testing.F) {
	f.Add(entries(f, 7, timerEntry(1, 0, 5), regEntry(3, "/data/f")), entries(f, 8, remapEntry(3, 9, remap_file_path.RemapType_LINKED)), "/data/f", "/data/g")
	f.Add(entries(f, 7, regEntry(3, "/data/f")), entries(f, 8, remapEntry(3, 9, remap_file_path.RemapType_LINKED)), "/data/f", "")
	f.Add(entries(f, 7, socket{kind: unix.SOCK_STREAM, protocol: unix.IPPROTO_TCP, local: "192.0.2.1:80", remote: "192.0.2.2:99"}.entry(1)), []byte(nil), "", "")
	f.Fuzz(func(t *testing.T, files, remaps []byte, name, now string) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, filesImage), files)
		write(t, filepath.Join(dir, remapsImage), remaps)
		before, err := readEntries(filepath.Join(dir, filesImage))
		if err != nil {
			return
		}
		names := inspect.Names{Files: map[string]string{name: now}}
		list := []inspect.Connection{{Local: netip.MustParseAddrPort("192.0.2.1:80"), Remote: netip.MustParseAddrPort("192.0.2.2:99"), Ended: true}}
		if mendImages(dir, names, list, nil, notInImages) != nil {
			return
		}
		after, err := readEntries(filepath.Join(dir, filesImage))
		if err != nil || len(after.entries) != len(before.entries) {
			t.Fatalf("%d entries have become %d, %v", len(before.entries), len(after.entries), err)
		}
		for _, data := range after.entries {
			e := &fdinfo.FileEntry{}
			if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(data, e); err != nil {
				t.Fatal(err)
			}
			if tfd := e.GetTfd(); tfd.GetTicks() > 0 && tfd.GetVsec() == 0 && tfd.GetVnsec() == 0 && tfd.GetIsec() > 0 && tfd.GetInsec() == 0 {
				t.Errorf("%v never ticks again", tfd)
			}
		}
	})
}

// Where sockets have moved, none is left at an address that the guest lacks.
func FuzzReaddress(f *testing.F) {
	f.Add(entries(f, 7, socket{kind: unix.SOCK_STREAM, protocol: unix.IPPROTO_TCP, local: "192.0.2.1:80", remote: "0.0.0.0:0"}.entry(1)))
	f.Add(entries(f, 7, socket{kind: unix.SOCK_DGRAM, protocol: unix.IPPROTO_UDP, local: "[2001:db8::1]:80", remote: "[2001:db8::1]:9", iface: "eth0"}.entry(1)))
	f.Add(entries(f, 7, socket{kind: unix.SOCK_STREAM, protocol: unix.IPPROTO_TCP, local: "192.0.2.1:80", remote: "198.51.100.1:99"}.entry(1)))
	gone := netip.MustParseAddr("192.0.2.1")
	a := &readdressing{
		moved:   map[netip.Addr]netip.Addr{gone: netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::1"): {}},
		outside: []inspect.Connection{{Local: netip.MustParseAddrPort("192.0.2.1:80"), Remote: netip.MustParseAddrPort("198.51.100.1:99")}},
	}
	f.Fuzz(func(t *testing.T, files []byte) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, filesImage), files)
		if _, err := a.apply(dir); err != nil {
			return
		}
		err := editImage(filepath.Join(dir, filesImage), func(e *fdinfo.FileEntry) bool {
			s := e.GetIsk()
			for _, words := range [][]uint32{s.GetSrcAddr(), s.GetDstAddr()} {
				if addr, ok := fromImage(s.GetFamily(), words); ok && addr == gone {
					t.Errorf("%v is still at %v", s, addr)
				}
			}
			return false
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// The parts of a sparse file are in order, do not overlap and lie within it.
func FuzzParseParts(f *testing.F) {
	f.Add([]byte("2\n4096\n4\n8192\n5\n"), int64(10000), int64(1024))
	f.Add([]byte("1\n9223372036854775807\n1\n"), int64(math.MaxInt64), int64(0))
	f.Add([]byte("-9223372036854775808\n"), int64(1), int64(0))
	f.Fuzz(func(t *testing.T, list []byte, size, at int64) {
		list = append(list, make([]byte, -len(list)&(blockSize-1))...)
		parts, err := parseParts(list, size, at)
		if err != nil {
			return
		}
		end := int64(0)
		for _, p := range parts {
			if p.offset < end || p.size < 0 || p.offset+p.size < p.offset || p.offset+p.size > size {
				t.Errorf("%q of %d bytes: %+v", list, size, parts)
			}
			end = p.offset + p.size
		}
	})
}

// Whatever the archive of /dev/shm is, nothing is made beside the directory that it
// is unpacked in, and nothing in it has set-id bits or is a device.
func FuzzRestoreShm(f *testing.F) {
	for _, list := range [][]tar.Header{
		{{Name: "d", Typeflag: tar.TypeDir}, {Name: "d/l", Linkname: "../../x", Typeflag: tar.TypeSymlink}, {Name: "d/l/f", Typeflag: tar.TypeReg, Mode: 0o6755}},
		{{Name: "f", Typeflag: tar.TypeFifo}, {Name: "h", Linkname: "f", Typeflag: tar.TypeLink}, {Name: "n", Typeflag: tar.TypeChar, Devmajor: 1}},
	} {
		data, err := os.ReadFile(writeTar(f, list))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	data, err := os.ReadFile(holes(f, 1<<42, "1\n4096\n4\n", "aaaa"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		archive, to := filepath.Join(dir, "archive"), filepath.Join(dir, "to", "shm")
		write(t, archive, data)
		if err := os.MkdirAll(to, 0o700); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_ = restoreShm(ctx, directory(t, to), archive) // it may be anything
		if ctx.Err() != nil {
			t.Error("it does not end")
		}
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrPermission) {
				return fs.SkipDir
			}
			if err != nil {
				return err
			}
			info, err := e.Info()
			if err != nil {
				return err
			}
			if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeDevice) != 0 {
				return fmt.Errorf("%s has the mode %s", path, info.Mode())
			}
			if rel, err := filepath.Rel(to, path); err != nil || !filepath.IsLocal(rel) && !slices.Contains([]string{dir, archive, filepath.Dir(to)}, path) {
				return fmt.Errorf("%s is outside", path)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// CRIU parses what an accepted request becomes.
func FuzzCheckRequest(f *testing.F) {
	f.Add([]byte(`{"externals":[{"name":"m0","destination":"/data","fstype":"virtiofs"}],"stdio":[{"fd":1,"key":"pipe:[7]"}]}`))
	f.Add([]byte(`{"externals":[{"name":"m0]:/\u0000","destination":"/data"}]}`))
	f.Add([]byte(`{"stdio":[{"fd":4711,"key":"tty[1:2]"}],"options":{"emptyNamespaces":["network"]}}`))
	external := regexp.MustCompile(`^mnt\[m[0-9]+\]:[^\x00]+$`)
	key := regexp.MustCompile(`^(pipe:\[[0-9]+\]|tty\[[0-9a-f]+:[0-9a-f]+\])$`)
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &api.RestoreRequest{}
		if protojson.Unmarshal(data, r) != nil || checkRequest(r) != nil {
			return
		}
		op, err := criu.NewOp(t.TempDir(), launch.Job{}, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer op.Close()
		opts := restoreOptions(op, r, "/images")
		for _, e := range opts.GetExternal() {
			if !external.MatchString(e) {
				t.Errorf("CRIU is given %q", e)
			}
		}
		for _, i := range opts.GetInheritFd() {
			if !key.MatchString(i.GetKey()) || i.GetFd() < launch.InheritBase || i.GetFd() > launch.InheritBase+2 {
				t.Errorf("CRIU is given %v", i)
			}
		}
	})
}
