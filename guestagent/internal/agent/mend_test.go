// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	sk_opts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	sk_unix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/timerfd"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

func notInImages(string) bool { return false }

// writeImage writes an image with any second number.
func writeImage[M proto.Message](t *testing.T, path string, entries ...M) {
	t.Helper()
	image := &entriesImage{magic: binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, imageMagic), 7)}
	for _, e := range entries {
		data, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		image.entries = append(image.entries, data)
	}
	if err := image.write(path); err != nil {
		t.Fatal(err)
	}
}

func readImage[T any, M interface {
	*T
	proto.Message
}](t *testing.T, path string) (out []M) {
	t.Helper()
	if err := editImage(path, func(m M) bool { out = append(out, m); return false }); err != nil {
		t.Fatal(err)
	}
	return out
}

var noOwner = &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(0), PidType: proto.Uint32(0), Pid: proto.Uint32(0)}

var someOptions = &sk_opts.SkOptsEntry{SoSndbuf: proto.Uint32(0), SoRcvbuf: proto.Uint32(0), SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0), SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)}

func timerEntry(ticks, left, interval uint64) *fdinfo.FileEntry {
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_TIMERFD.Enum(), Id: proto.Uint32(1), Tfd: &timerfd.TimerfdEntry{
		Id: proto.Uint32(1), Flags: proto.Uint32(0), Fown: noOwner, Clockid: proto.Uint32(1), Ticks: proto.Uint64(ticks), SettimeFlags: proto.Uint32(0),
		Vsec: proto.Uint64(0), Vnsec: proto.Uint64(left), Isec: proto.Uint64(interval), Insec: proto.Uint64(0),
	}}
}

func TestAnExpiredPeriodicTimerGoesOn(t *testing.T) {
	for name, test := range map[string]struct{ ticks, left, interval, want uint64 }{
		"expired":          {3, 0, 5, 1},
		"disarmed":         {0, 0, 5, 0}, // its interval stays
		"not yet expired":  {0, 99, 5, 99},
		"again, unread":    {1, 99, 5, 99},
		"once, and unread": {1, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, filesImage)
			writeImage(t, path, timerEntry(test.ticks, test.left, test.interval))
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := mendImages(dir, inspect.Names{}, nil, nil, notInImages); err != nil {
				t.Fatal(err)
			}
			entries := readImage[fdinfo.FileEntry](t, path)
			if len(entries) != 1 || entries[0].GetTfd().GetVnsec() != test.want || entries[0].GetTfd().GetTicks() != test.ticks {
				t.Errorf("entries %v", entries)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if unchanged := slices.Equal(before, after); unchanged != (test.want == test.left) {
				t.Errorf("the file is unchanged: %v", unchanged)
			}
		})
	}
}

func regEntry(id uint32, name string) *fdinfo.FileEntry {
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(id), Reg: &regfile.RegFileEntry{
		Id: proto.Uint32(id), Flags: proto.Uint32(0), Pos: proto.Uint64(0), Fown: noOwner, Name: proto.String(name),
	}}
}

func remapEntry(from, to uint32, kind remap_file_path.RemapType) *remap_file_path.RemapFilePathEntry {
	return &remap_file_path.RemapFilePathEntry{OrigId: proto.Uint32(from), RemapId: proto.Uint32(to), RemapType: kind.Enum()}
}

func TestFilesAreOpenedByTheNamesThatTheyHave(t *testing.T) {
	dir := t.TempDir()
	writeImage(t, filepath.Join(dir, filesImage), regEntry(1, "/d/a"), regEntry(2, "/d/link_remap.2"), regEntry(3, "/d/a"), regEntry(4, "/d/ghost"), regEntry(5, "/run/a"))
	remaps := filepath.Join(dir, remapsImage)
	writeImage(t, remaps, remapEntry(1, 2, remap_file_path.RemapType_LINKED), remapEntry(4, 9, remap_file_path.RemapType_GHOST), remapEntry(5, 6, remap_file_path.RemapType_LINKED))
	if err := mendImages(dir, inspect.Names{Files: map[string]string{"/d/a": "/d/b", "/d/ghost": "/d/no", "/run/a": "/run/b"}}, nil, nil, func(path string) bool { return path == "/run/a" }); err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, f := range readImage[fdinfo.FileEntry](t, filepath.Join(dir, filesImage)) {
		have = append(have, f.GetReg().GetName())
	}
	// The third is another file, of the first's old name.
	if want := []string{"/d/b", "/d/link_remap.2", "/d/a", "/d/ghost", "/run/a"}; !slices.Equal(have, want) {
		t.Errorf("the files are %q, not %q", have, want)
	}
	if left := readImage[remap_file_path.RemapFilePathEntry](t, remaps); len(left) != 2 || left[0].GetOrigId() != 4 || left[1].GetOrigId() != 5 {
		t.Errorf("the remaps are %v", left)
	}
}

func TestAFileWithoutAnotherNameIsAnError(t *testing.T) {
	dir := t.TempDir()
	writeImage(t, filepath.Join(dir, filesImage), regEntry(1, "/d/a"))
	writeImage(t, filepath.Join(dir, remapsImage), remapEntry(1, 2, remap_file_path.RemapType_LINKED))
	if err := mendImages(dir, inspect.Names{}, nil, nil, notInImages); err == nil {
		t.Error("the image set would need a file that CRIU has removed")
	}
}

func TestAListenerIsBoundToTheNameThatItHas(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, filesImage)
	writeImage(t, path, &fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: proto.Uint32(1), Usk: &sk_unix.UnixSkEntry{
		Id: proto.Uint32(1), Ino: proto.Uint32(77), Type: proto.Uint32(1), State: proto.Uint32(10), Flags: proto.Uint32(0), Uflags: proto.Uint32(0), Backlog: proto.Uint32(5),
		Peer: proto.Uint32(0), Fown: noOwner, Opts: someOptions,
		Name: []byte("/run/s.tmp\x00"), Deleted: proto.Bool(true),
	}})
	if err := mendImages(dir, inspect.Names{Sockets: map[uint32]string{77: "/run/s"}}, nil, nil, notInImages); err != nil {
		t.Fatal(err)
	}
	socket := readImage[fdinfo.FileEntry](t, path)[0].GetUsk()
	if string(socket.GetName()) != "/run/s\x00" || socket.GetDeleted() {
		t.Errorf("the socket is %v", socket)
	}
}

func TestABrokenImageIsAnError(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, filesImage)
	writeImage(t, path, timerEntry(1, 0, 1))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, broken := range map[string][]byte{"short": data[:len(data)-1], "no magic": data[4:], "half a size": append(slices.Clone(data), 1, 0), "empty": nil} {
		if err := os.WriteFile(path, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := mendImages(dir, inspect.Names{}, nil, nil, notInImages); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestOfAFailedDumpTheLogsAreKept(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{imageset.DumpLogName, imageset.StatsName, imageset.InventoryName, "pages-1.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := keepLogs(dir); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(dir + "/*")
	if want := []string{filepath.Join(dir, imageset.DumpLogName), filepath.Join(dir, imageset.StatsName)}; err != nil || !slices.Equal(left, want) {
		t.Errorf("%q is left, not %q (%v)", left, want, err)
	}
}

func TestLinksOfADumpThatWasKilledAreRemoved(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"file", "link_remap.7"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []string{"link_remap.5", "link_remap.x", "other"} {
		if err := os.Link(filepath.Join(dir, "file"), filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	look, err := inspect.LookAtFiles(t.Context(), os.Getpid(), []int{os.Getpid()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	look.Names = inspect.Names{Files: map[string]string{filepath.Join(dir, "gone"): filepath.Join(dir, "file")}}
	if err := removeLinkRemaps(look); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(dir + "/*")
	for i := range left {
		left[i] = filepath.Base(left[i])
	}
	// The 7 is a file of its own.
	if want := []string{"file", "link_remap.7", "link_remap.x", "other"}; err != nil || !slices.Equal(left, want) {
		t.Errorf("%q is left, not %q (%v)", left, want, err)
	}
}

// A file that CRIU alone finds again may have lost its directory, too.
func TestLinksAboveARemovedDirectory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("enters a mount namespace")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link_remap.5", "other"} {
		if err := os.Link(filepath.Join(dir, "file"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "link_remap.7"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "file"), &st); err != nil {
		t.Fatal(err)
	}
	look, err := inspect.Look(t.Context(), os.Getpid(), []int{os.Getpid()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	look.Names = inspect.Names{Linked: []inspect.Linked{{Path: filepath.Join(dir, "gone/too/a"), Device: st.Dev, Inode: st.Ino}}}
	if err := removeLinkRemaps(look); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(dir + "/*")
	for i := range left {
		left[i] = filepath.Base(left[i])
	}
	if want := []string{"file", "link_remap.7", "other"}; err != nil || !slices.Equal(left, want) {
		t.Errorf("%q is left, not %q (%v)", left, want, err)
	}
}

// A connection that a peer outside has closed is restored as a socket without
// one: nobody has its address. Others remain.
func TestEndedConnectionIsClosed(t *testing.T) {
	dir := t.TempDir()
	words := func(addr string, n int) []uint32 { return imageAddress(netip.MustParseAddr(addr), n) }
	socket := func(id, family uint32, state uint32, peer string) *fdinfo.FileEntry {
		n := map[uint32]int{unix.AF_INET: 1, unix.AF_INET6: 4}[family]
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: &id, Isk: &sk_inet.InetSkEntry{
			Id: &id, Ino: &id, Family: &family, Type: proto.Uint32(unix.SOCK_STREAM), Proto: proto.Uint32(unix.IPPROTO_TCP), State: &state,
			SrcPort: proto.Uint32(80), DstPort: proto.Uint32(5000), Flags: proto.Uint32(0), Backlog: proto.Uint32(0), Fown: noOwner, Opts: someOptions,
			SrcAddr: words("10.0.0.2", n), DstAddr: words(peer, n),
		}}
	}
	const closeWait = unix.BPF_TCP_CLOSE_WAIT
	writeImage(t, filepath.Join(dir, filesImage), socket(1, unix.AF_INET, closeWait, "10.0.0.1"), socket(2, unix.AF_INET6, closeWait, "10.0.0.3"),
		socket(3, unix.AF_INET, closeWait, "10.0.0.4"), socket(4, unix.AF_INET, unix.BPF_TCP_ESTABLISHED, "10.0.0.1"), socket(5, unix.AF_INET, closeWait, "10.0.0.5"))
	local := netip.MustParseAddrPort("10.0.0.2:80")
	connection := func(peer string, ended bool) inspect.Connection {
		return inspect.Connection{Local: local, Remote: netip.MustParseAddrPort(peer + ":5000"), Ended: ended}
	}
	if err := mendImages(dir, inspect.Names{}, []inspect.Connection{connection("10.0.0.1", true), connection("10.0.0.3", true), connection("10.0.0.4", false)}, nil, notInImages); err != nil {
		t.Fatal(err)
	}
	closed := make(map[uint32]bool)
	for _, f := range readImage[fdinfo.FileEntry](t, filepath.Join(dir, filesImage)) {
		s := f.GetIsk()
		closed[f.GetId()] = s.GetState() == unix.BPF_TCP_CLOSE && s.GetSrcPort() == 0 && s.GetDstPort() == 0
	}
	if want := map[uint32]bool{1: true, 2: true, 3: false, 4: false, 5: false}; !maps.Equal(closed, want) {
		t.Errorf("closed are %v, want %v", closed, want)
	}
}
