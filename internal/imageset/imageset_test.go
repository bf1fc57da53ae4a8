// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func digest(content string) string {
	sum := blake3.Sum256([]byte(content))
	return hex.EncodeToString(sum[:])
}

// names lists a directory, hidden files included.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q lacks %q", err, p)
		}
	}
}

// memory makes a directory in memory where there is any, where a sync costs
// nothing.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kata-checkpoint-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newSet commits an image set of some files and returns its directory.
func newSet(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(memory(t), "set")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	commit(t, dir, files)
	return dir
}

func commit(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	exchange := memory(t)
	if err := os.Mkdir(filepath.Join(exchange, "images"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		write(t, filepath.Join(exchange, "images", name), content)
	}
	target, err := NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	list, err := collect(t.Context(), exchange, "images", target.Dir(), Limits{Files: 100, Bytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(target.Commit(t.Context(), &Manifest{Files: list}, nil), target.Abort()); err != nil {
		t.Fatal(err)
	}
}

var someFiles = map[string]string{"inventory.img": "inventory", "pages-1.img": strings.Repeat("page", 1<<16), "files.img": ""}

func TestImageSetThereAndBack(t *testing.T) {
	dir := newSet(t, someFiles)
	set, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if set.Manifest.FormatVersion != FormatVersion {
		t.Errorf("format version %d", set.Manifest.FormatVersion)
	}
	stage := filepath.Join(t.TempDir(), "restore")
	if err := set.CopyTo(t.Context(), stage, roomy); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"files.img", "inventory.img", "pages-1.img"}, names(t, stage)); diff != "" {
		t.Errorf("staged files (-want +got):\n%s", diff)
	}
	for name, want := range someFiles {
		got, err := os.ReadFile(filepath.Join(stage, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// What a guest may put into its directory to reach beyond it, or to exhaust
// the host.
// collect takes what is all there already.
func collect(ctx context.Context, src, name string, dst *os.File, limits Limits, skip ...string) ([]File, error) {
	return Follow(src, name, dst, limits, skip...).Collect(ctx)
}

func TestCollectTakesNothingButRegularFiles(t *testing.T) {
	for name, tc := range map[string]struct {
		lay    func(t *testing.T, dir, outside string)
		limits Limits
		err    string
	}{
		"a symbolic link to a file": {
			lay: func(t *testing.T, dir, outside string) {
				if err := os.Symlink(outside, filepath.Join(dir, "pages-1.img")); err != nil {
					t.Fatal(err)
				}
			},
			err: `"pages-1.img" is not a regular file`,
		},
		"a dangling symbolic link": {
			lay: func(t *testing.T, dir, _ string) {
				if err := os.Symlink("/nowhere", filepath.Join(dir, "pages-1.img")); err != nil {
					t.Fatal(err)
				}
			},
			err: "not a regular file",
		},
		"a hard link to a file elsewhere": {
			lay: func(t *testing.T, dir, outside string) {
				if err := os.Link(outside, filepath.Join(dir, "pages-1.img")); err != nil {
					t.Fatal(err)
				}
			},
			err: "not a regular file with a single link",
		},
		"a FIFO, which nobody writes to": {
			lay: func(t *testing.T, dir, _ string) {
				if err := unix.Mkfifo(filepath.Join(dir, "pages-1.img"), 0o600); err != nil {
					t.Fatal(err)
				}
			},
			err: "not a regular file",
		},
		"a socket": {
			lay: func(t *testing.T, dir, _ string) {
				if err := unix.Mknod(filepath.Join(dir, "pages-1.img"), unix.S_IFSOCK|0o600, 0); err != nil {
					t.Fatal(err)
				}
			},
			err: "not a regular file",
		},
		"a directory": {
			lay: func(t *testing.T, dir, _ string) {
				if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
					t.Fatal(err)
				}
			},
			err: `"sub" is not a regular file`,
		},
		"a manifest of the guest's own": {
			lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, ManifestName), "{}") },
			err: "only the host may write",
		},
		"a signature of the guest's own": {
			lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, SignatureName), "x") },
			err: "only the host may write",
		},
		"a hidden file":               {lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, ".x"), "") }, err: "not allowed"},
		"a whiteout":                  {lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, ".wh.x"), "") }, err: "not allowed"},
		"two dots in a name":          {lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, "a..b"), "") }, err: "not allowed"},
		"a line feed in a name":       {lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, "a\nb"), "") }, err: "not allowed"},
		"an escape sequence":          {lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, "a\x1b[0m"), "") }, err: "not allowed"},
		"bytes that are no character": {lay: func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, "a\xff"), "") }, err: "not allowed"},
		"too many files": {
			lay: func(t *testing.T, dir, _ string) {
				write(t, filepath.Join(dir, "a"), "")
				write(t, filepath.Join(dir, "b"), "")
			},
			limits: Limits{Files: 2, Bytes: 100}, err: "more than 2 files",
		},
		"one large file": {
			lay:    func(t *testing.T, dir, _ string) { write(t, filepath.Join(dir, "z"), strings.Repeat("x", 101)) },
			limits: Limits{Files: 9, Bytes: 100}, err: "max_image_bytes",
		},
		"many small ones, together too large": {
			lay: func(t *testing.T, dir, _ string) {
				write(t, filepath.Join(dir, "y"), strings.Repeat("x", 60))
				write(t, filepath.Join(dir, "z"), strings.Repeat("x", 60))
			},
			limits: Limits{Files: 9, Bytes: 100}, err: "max_image_bytes",
		},
		"a file of holes, which costs the guest nothing": {
			lay: func(t *testing.T, dir, _ string) {
				write(t, filepath.Join(dir, "z"), "")
				if err := os.Truncate(filepath.Join(dir, "z"), 1<<40); err != nil {
					t.Fatal(err)
				}
			},
			limits: Limits{Files: 9, Bytes: 1 << 20}, err: "max_image_bytes",
		},
	} {
		t.Run(name, func(t *testing.T) {
			exchange, outside := t.TempDir(), filepath.Join(t.TempDir(), "secret")
			write(t, outside, "the host's")
			dir := filepath.Join(exchange, "images")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "inventory.img"), "")
			tc.lay(t, dir, outside)
			if tc.limits.Files == 0 {
				tc.limits = Limits{Files: 100, Bytes: 1 << 20}
			}
			dst := t.TempDir()
			f, err := os.Open(dst)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = collect(t.Context(), exchange, "images", f, tc.limits)
			wantError(t, err, tc.err)
			for _, n := range names(t, dst) {
				if data, _ := os.ReadFile(filepath.Join(dst, n)); strings.Contains(string(data), "the host's") {
					t.Errorf("%s has the content of a file outside", n)
				}
			}
		})
	}
}

// watch counts how often a file is opened, whatever its name is at the time.
func watch(t *testing.T, path string) (opens func() int) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	return func() int {
		total, buf := 0, make([]byte, 64<<10)
		for {
			n, err := unix.Read(fd, buf)
			if err != nil {
				return total
			}
			total += n / unix.SizeofInotifyEvent // events of a file have no name
		}
	}
}

// exchanging has a guest exchange two files all the time, until stop is called.
func exchanging(t *testing.T, a, b string) (stop func()) {
	var stopped atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stopped.Load() {
			if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	return sync.OnceFunc(func() {
		stopped.Store(true)
		<-done
	})
}

// The FIFO stands for a device: both are opened by open(2) only.
func TestNothingButRegularFilesIsEverOpened(t *testing.T) {
	dir := t.TempDir()
	image, fifo := filepath.Join(dir, "pages-1.img"), filepath.Join(dir, "fifo")
	write(t, image, "x")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	opens := watch(t, fifo)
	defer exchanging(t, image, fifo)()
	top, err := openDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	opened, refused := 0, 0
	for deadline := time.Now().Add(10 * time.Second); (opened < 200 || refused < 200) && time.Now().Before(deadline); {
		f, _, err := openRegular(top, "pages-1.img")
		switch {
		case err == nil:
			opened++
			f.Close()
		case errors.Is(err, regular.ErrNot):
			refused++
		default:
			t.Fatal(err)
		}
	}
	if opened == 0 || refused == 0 {
		t.Errorf("the file was there %d times, the FIFO %d times", opened, refused)
	}
	if n := opens(); n > 0 {
		t.Errorf("the FIFO was opened %d times", n)
	}
}

func TestCollectStaysBeneath(t *testing.T) {
	outside := t.TempDir()
	write(t, filepath.Join(outside, "inventory.img"), "the host's")
	exchange := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(exchange, "images")); err != nil {
		t.Fatal(err)
	}
	dst, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	for _, name := range []string{"images", "..", "../" + filepath.Base(outside), outside} {
		if _, err := collect(t.Context(), exchange, name, dst, Limits{Files: 9, Bytes: 100}); err == nil {
			t.Errorf("%q was followed", name)
		}
		if data, err := ReadFile(exchange, name, "inventory.img", 100); err == nil {
			t.Errorf("%q was followed: %q", name, data)
		}
	}
	if err := os.Rename(exchange, exchange+"-moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, exchange); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(t.Context(), exchange, ".", dst, Limits{Files: 9, Bytes: 100}); err == nil {
		t.Error("an exchange directory that is a link was followed")
	}
}

func TestCollectSkips(t *testing.T) {
	exchange := t.TempDir()
	for name, content := range map[string]string{"inventory.img": "i", DumpLogName: "log", StatsName: "stats"} {
		write(t, filepath.Join(exchange, name), content)
	}
	dst, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	files, err := collect(t.Context(), exchange, ".", dst, Limits{Files: 9, Bytes: 100}, DumpLogName, StatsName)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]File{{Name: "inventory.img", Size: 1, BLAKE3: digest("i")}}, files); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// vast makes a file that is a hole.
func vast(t *testing.T, path string, size int64) {
	t.Helper()
	write(t, path, "")
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

func wantVast(t *testing.T, path string, size int64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != size || st.Blocks != 0 {
		t.Errorf("%s has %d bytes in %d blocks, want %d in none", filepath.Base(path), st.Size, st.Blocks, size)
	}
}

// A file of holes costs the guest nothing, and the host neither.
func TestHolesStayHoles(t *testing.T) {
	const size = 256<<20 + 5
	exchange, to, stage := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "stage")
	if err := os.Mkdir(filepath.Join(exchange, "images"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(exchange, "images", InventoryName), "i")
	vast(t, filepath.Join(exchange, "images", "pages-1.img"), size)
	target, err := NewTarget(to)
	if err != nil {
		t.Fatal(err)
	}
	files, err := collect(t.Context(), exchange, "images", target.Dir(), Limits{Files: 2, Bytes: size + 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Commit(t.Context(), &Manifest{Files: files}, nil); err != nil {
		t.Fatal(err)
	}
	wantVast(t, filepath.Join(to, "pages-1.img"), size)

	set, err := Open(to)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if err := set.CopyTo(t.Context(), stage, Limits{Files: 2, Bytes: size + 1}); err != nil {
		t.Fatal(err) // also if the digest is another
	}
	wantVast(t, filepath.Join(stage, "pages-1.img"), size)
	for name, limits := range map[string]Limits{"max_image_bytes": {Files: 2, Bytes: size}, "max_image_files": {Files: 1, Bytes: size + 1}} {
		wantError(t, set.CopyTo(t.Context(), filepath.Join(t.TempDir(), "stage"), limits), name)
	}
}

// What stays free stays free, whoever fills the file system.
func TestCopiesLeaveTheReserve(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("imageset", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Skip("needs to mount: ", err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH) //nolint:errcheck // a test's
	dir := newSet(t, map[string]string{InventoryName: "i", "pages-1.img": strings.Repeat("p", 1<<20-1)})
	set, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	limits := Limits{Files: 9, Bytes: 1 << 30, Reserve: 1 << 30} // a twentieth of 4 MiB
	if err := set.CopyTo(t.Context(), filepath.Join(small, "one"), limits); err != nil {
		t.Error(err)
	}
	write(t, filepath.Join(small, "other"), strings.Repeat("x", 2<<20-100<<10))
	err = set.CopyTo(t.Context(), filepath.Join(small, "two"), limits)
	wantError(t, err, "reserve_bytes", small)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error %v", err)
	}
}

func TestReadFileIsBounded(t *testing.T) {
	exchange := t.TempDir()
	write(t, filepath.Join(exchange, "log"), "0123456789")
	for limit, want := range map[int64]string{4: "6789", 10: "0123456789", 99: "0123456789"} {
		if got, err := ReadFile(exchange, ".", "log", limit); err != nil || string(got) != want {
			t.Errorf("%d bytes: got %q, %v, want %q", limit, got, err, want)
		}
	}
}

func TestCopyEndsWithItsContext(t *testing.T) {
	exchange := t.TempDir()
	write(t, filepath.Join(exchange, "inventory.img"), "i")
	dst, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	gone := errors.New("the caller has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if _, err := collect(ctx, exchange, ".", dst, Limits{Files: 9, Bytes: 100}); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

// edit changes the manifest of an image set.
func edit(t *testing.T, dir string, change func(map[string]any)) {
	t.Helper()
	path := filepath.Join(dir, ManifestName)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{}
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	if data, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	write(t, path, string(data))
}

func file(m map[string]any, i int) map[string]any { return m["files"].([]any)[i].(map[string]any) }

func TestDamagedSetIsRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		damage func(t *testing.T, dir string)
		err    []string
	}{
		"no manifest": {
			damage: func(_ *testing.T, dir string) { os.Remove(filepath.Join(dir, ManifestName)) },
			err:    []string{"not an image set", ManifestName},
		},
		"a file is missing": {
			damage: func(_ *testing.T, dir string) { os.Remove(filepath.Join(dir, "pages-1.img")) },
			err:    []string{"pages-1.img is missing"},
		},
		"a file is truncated": {
			damage: func(t *testing.T, dir string) {
				if err := os.Truncate(filepath.Join(dir, "pages-1.img"), 7); err != nil {
					t.Fatal(err)
				}
			},
			err: []string{"pages-1.img has 7 bytes and should have 262144"},
		},
		"a byte is flipped": {
			damage: func(t *testing.T, dir string) { write(t, filepath.Join(dir, "inventory.img"), "inventorY") },
			err:    []string{"inventory.img is damaged", "digest"},
		},
		"a file too many": {
			damage: func(t *testing.T, dir string) { write(t, filepath.Join(dir, "more.img"), "") },
			err:    []string{"more.img"},
		},
		"a thousand files too many": {
			damage: func(t *testing.T, dir string) {
				for i := range 1000 {
					write(t, filepath.Join(dir, fmt.Sprint(i)), "")
				}
			},
			err: []string{"files that its manifest does not list"},
		},
		"a directory too many": {
			damage: func(t *testing.T, dir string) {
				if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
					t.Fatal(err)
				}
			},
			err: []string{`"sub" is not listed`},
		},
		"a symbolic link in a file's place": {
			damage: func(t *testing.T, dir string) {
				moved := filepath.Join(memory(t), "moved")
				if err := errors.Join(os.Rename(filepath.Join(dir, "inventory.img"), moved), os.Symlink(moved, filepath.Join(dir, "inventory.img"))); err != nil {
					t.Fatal(err)
				}
			},
			err: []string{"inventory.img is not a regular file"},
		},
		"a symbolic link in the manifest's place": {
			damage: func(t *testing.T, dir string) {
				moved := filepath.Join(memory(t), "moved")
				if err := errors.Join(os.Rename(filepath.Join(dir, ManifestName), moved), os.Symlink(moved, filepath.Join(dir, ManifestName))); err != nil {
					t.Fatal(err)
				}
			},
			err: []string{"not a regular file"},
		},
		"a path with two dots": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { file(m, 0)["name"] = "../../etc/passwd" })
			},
			err: []string{"damaged", "../../etc/passwd"},
		},
		"an absolute path": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { file(m, 0)["name"] = "/etc/passwd" })
			},
			err: []string{"damaged", "/etc/passwd"},
		},
		"the manifest among its own files": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { file(m, 0)["name"] = ManifestName })
			},
			err: []string{"damaged"},
		},
		"a file named twice": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { file(m, 0)["name"] = file(m, 1)["name"] })
			},
			err: []string{"damaged", "twice"},
		},
		"a negative size": {
			damage: func(t *testing.T, dir string) { edit(t, dir, func(m map[string]any) { file(m, 0)["size"] = -1 }) },
			err:    []string{"damaged", "size"},
		},
		"a digest of another length": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { file(m, 0)["blake3"] = "00" })
			},
			err: []string{"damaged", "digest"},
		},
		"an unknown format version": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { m["formatVersion"] = FormatVersion + 1 })
			},
			err: []string{"format version 4", "reads 1 to 3"},
		},
		"no format version": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { delete(m, "formatVersion") })
			},
			err: []string{"format version 0"},
		},
		"a field that nobody knows": {
			damage: func(t *testing.T, dir string) { edit(t, dir, func(m map[string]any) { m["new"] = true }) },
			err:    []string{"damaged", `"new"`},
		},
		"an address without an interface": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) {
					m["addresses"] = []any{map[string]any{"interface": "", "address": "192.0.2.2"}}
				})
			},
			err: []string{"damaged", "network interface"},
		},
		"an address with a zone": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) {
					m["addresses"] = []any{map[string]any{"interface": "eth0", "address": "fe80::1%eth0"}}
				})
			},
			err: []string{"damaged", "invalid address"},
		},
		"an invalid address": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { m["addresses"] = []any{map[string]any{"interface": "eth0", "address": "here"}} })
			},
			err: []string{"damaged"},
		},
		"no inventory": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { m["files"] = []any{} })
			},
			err: []string{"inventory.img"},
		},
		"a signature that the format does not know": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { m["formatVersion"] = 1 })
				write(t, filepath.Join(dir, SignatureName), "x")
			},
			err: []string{SignatureName, "is not listed"},
		},
		"rights that are sentences": {
			damage: func(t *testing.T, dir string) {
				edit(t, dir, func(m map[string]any) { m["rights"] = map[string]any{"namespaces": []any{"a b"}} })
			},
			err: []string{"damaged", "neither a capability nor a namespace"},
		},
		"a signer that is a sentence": {
			damage: func(t *testing.T, dir string) { edit(t, dir, func(m map[string]any) { m["signedBy"] = "me" }) },
			err:    []string{"damaged", "fingerprint"},
		},
		"a manifest that is not JSON": {
			damage: func(t *testing.T, dir string) { write(t, filepath.Join(dir, ManifestName), "{") },
			err:    []string{"damaged"},
		},
		"a manifest with more behind it": {
			damage: func(t *testing.T, dir string) {
				data, err := os.ReadFile(filepath.Join(dir, ManifestName))
				if err != nil {
					t.Fatal(err)
				}
				write(t, filepath.Join(dir, ManifestName), string(data)+"{}")
			},
			err: []string{"damaged"},
		},
		"an endless manifest": {
			damage: func(t *testing.T, dir string) {
				if err := os.Truncate(filepath.Join(dir, ManifestName), 1<<40); err != nil {
					t.Fatal(err)
				}
			},
			err: []string{"larger than"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			good := newSet(t, someFiles)
			dir := newSet(t, someFiles)
			tc.damage(t, dir)
			stage := filepath.Join(t.TempDir(), "restore")
			wantError(t, stageFrom(t, dir, stage), tc.err...)
			if _, err := os.Lstat(stage); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("something is left at the staging directory: %v", err)
			}
			if err := stageFrom(t, good, stage); err != nil {
				t.Errorf("the good copy afterwards: %v", err)
			}
		})
	}
}

func stageFrom(t *testing.T, dir, stage string) error {
	set, err := Open(dir)
	if err != nil {
		return err
	}
	defer set.Close()
	return set.CopyTo(t.Context(), stage, roomy)
}

func TestOpenFollowsNoLink(t *testing.T) {
	dir := newSet(t, someFiles)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(link); err == nil {
		t.Error("a symbolic link was taken for a checkpoint directory")
	}
}

func TestNewTarget(t *testing.T) {
	t.Run("a directory that is not there", func(t *testing.T) {
		_, err := NewTarget(filepath.Join(t.TempDir(), "none"))
		wantError(t, err, "does not exist", "create it first")
	})
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "f")
		write(t, path, "")
		_, err := NewTarget(path)
		wantError(t, err, "is not a directory")
	})
	t.Run("a symbolic link", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "l")
		if err := os.Symlink(t.TempDir(), path); err != nil {
			t.Fatal(err)
		}
		_, err := NewTarget(path)
		wantError(t, err, "is not a directory")
	})
	t.Run("a directory with something else", func(t *testing.T) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "letter.txt"), "dear")
		_, err := NewTarget(dir)
		wantError(t, err, "not empty", "letter.txt")
		if diff := cmp.Diff([]string{"letter.txt"}, names(t, dir)); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("a damaged earlier checkpoint is not thrown away", func(t *testing.T) {
		dir := newSet(t, someFiles)
		write(t, filepath.Join(dir, "letter.txt"), "dear")
		_, err := NewTarget(dir)
		wantError(t, err, "name an empty directory")
		if _, err := os.Stat(filepath.Join(dir, "letter.txt")); err != nil {
			t.Error(err)
		}
	})
	t.Run("what was left unfinished is removed", func(t *testing.T) {
		dir := t.TempDir()
		left := filepath.Join(dir, stagingPrefix+"0123456789abcdef")
		if err := os.Mkdir(left, 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(left, "pages-1.img"), "x")
		target, err := NewTarget(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Abort(); err != nil {
			t.Fatal(err)
		}
		if got := names(t, dir); len(got) != 0 {
			t.Errorf("left over: %v", got)
		}
	})
	t.Run("what is in progress is not", func(t *testing.T) {
		dir := t.TempDir()
		first, err := NewTarget(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = first.Abort() }()
		_, err = NewTarget(dir)
		wantError(t, err, "another checkpoint is being written")
		write(t, filepath.Join(first.Dir().Name(), "inventory.img"), "i")
		if err := first.Commit(t.Context(), &Manifest{Files: []File{{Name: "inventory.img", Size: 1, BLAKE3: digest("i")}}}, nil); err != nil {
			t.Error(err)
		}
	})
}

// A process that can open no more files leaves no directory behind.
func TestNewTargetWithoutDescriptors(t *testing.T) {
	set := newSet(t, someFiles)
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
			t.Error(err)
		}
	}()
	failed := 0
	for limit := uint64(4); ; limit++ {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: before.Max}); err != nil {
			t.Fatal(err)
		}
		target, err := NewTarget(set)
		if lerr := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); lerr != nil {
			t.Fatal(lerr)
		}
		if err == nil {
			if err := target.Abort(); err != nil {
				t.Error(err)
			}
			break
		}
		failed++
		if left := names(t, filepath.Dir(set)); len(left) != 1 {
			t.Fatalf("with %d descriptors: %v; there is %q", limit, err, left)
		}
	}
	if failed < 3 {
		t.Errorf("it has failed %d times only", failed)
	}
}

func TestAbortLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	target, err := NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !IsStaging(target.Dir().Name()) {
		t.Errorf("%s is not known as unfinished", target.Dir().Name())
	}
	write(t, filepath.Join(target.Dir().Name(), "inventory.img"), "i")
	for range 2 {
		if err := target.Abort(); err != nil {
			t.Fatal(err)
		}
	}
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("left over: %v", got)
	}
}

func TestCommitReplacesAnEarlierSetWhole(t *testing.T) {
	dir := newSet(t, map[string]string{"inventory.img": "old", "core-1.img": "old"})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	commit(t, dir, map[string]string{"inventory.img": "new"})
	set, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if diff := cmp.Diff([]File{{Name: "inventory.img", Size: 3, BLAKE3: digest("new")}}, set.Manifest.Files); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := names(t, filepath.Dir(dir)); len(got) != 1 {
		t.Errorf("left beside the image set: %v", got)
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestAbortKeepsAnEarlierSet(t *testing.T) {
	dir := newSet(t, someFiles)
	target, err := NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := stageFrom(t, dir, filepath.Join(t.TempDir(), "x")); err != nil {
		t.Error(err)
	}
	if got := names(t, filepath.Dir(dir)); len(got) != 1 {
		t.Errorf("left beside the image set: %v", got)
	}
}

// What a guest's answer makes of a manifest is read before anything is replaced,
// let alone stopped.
func TestCommitWritesNothingThatCannotBeRead(t *testing.T) {
	for name, m := range map[string]*Manifest{
		"an empty phase for each two bytes": {Phases: make([]Phase, 1<<16)},
		"a host name of control characters": {Container: Container{Hostname: strings.Repeat("\x00", 1<<16)}},
		"a mount with a name of its own":    {Externals: []External{{Name: "m0]:/\x00", Destination: "/data"}}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newSet(t, someFiles)
			target, err := NewTarget(dir)
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(target.Dir().Name(), "inventory.img"), "i")
			m.Files = []File{{Name: "inventory.img", Size: 1, BLAKE3: digest("i")}}
			wantError(t, target.Commit(t.Context(), m, nil), "write manifest")
			if err := target.Abort(); err != nil {
				t.Error(err)
			}
			if err := stageFrom(t, dir, filepath.Join(t.TempDir(), "x")); err != nil {
				t.Errorf("the earlier checkpoint: %v", err)
			}
		})
	}
}

// A commit that fails half way, here because a file was never written, leaves
// no file under its final name.
func TestCommitIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	target, err := NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(target.Dir().Name(), "inventory.img"), "i")
	err = target.Commit(t.Context(), &Manifest{Files: []File{{Name: "inventory.img", BLAKE3: digest("i")}, {Name: "pages-1.img", BLAKE3: digest("p")}}}, nil)
	wantError(t, err, "pages-1.img")
	if err := target.Abort(); err != nil {
		t.Error(err)
	}
	if got := names(t, dir); len(got) != 0 {
		t.Errorf("left over: %v", got)
	}
}

func TestIsStaging(t *testing.T) {
	for path, want := range map[string]bool{
		"/a/.kata-checkpoint-0123456789abcdef": true,
		"/a/.kata-checkpoint-0123":             false,
		"/a/.kata-checkpoint":                  false,
		"/a/x":                                 false,
		".kata-checkpoint-0123456789abcdef":    false,
		"/":                                    false,
		"":                                     false,
	} {
		if got := IsStaging(path); got != want {
			t.Errorf("%q: %v", path, got)
		}
	}
}

// halfACommit lays out what is left of a Commit that was killed after it moved
// the first of its files, and returns the staging directory. Moving is its list.
func halfACommit(t *testing.T, dir, moving string) string {
	t.Helper()
	target, err := NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := &Manifest{FormatVersion: FormatVersion, Files: []File{
		{Name: "inventory.img", Size: 1, BLAKE3: digest("i")}, {Name: "pages-1.img", Size: 1, BLAKE3: digest("p")},
	}}
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	staging := target.Dir().Name()
	write(t, filepath.Join(dir, "inventory.img"), "i") // as if it had been moved
	write(t, filepath.Join(staging, "pages-1.img"), "p")
	write(t, filepath.Join(staging, ManifestName), string(data))
	write(t, filepath.Join(staging, committingName), moving)
	target.Dir().Close() // which a kill does, and the lock with it
	return staging
}

// A Commit that was killed while it gave the files their final names is taken
// back, by whoever finds it: `delete`, or the next checkpoint.
func TestHalfACommitIsTakenBack(t *testing.T) {
	half := func(t *testing.T, dir string) string {
		return halfACommit(t, dir, `["inventory.img","pages-1.img","kata-checkpoint.json"]`)
	}
	t.Run("by delete", func(t *testing.T) {
		dir := t.TempDir()
		if err := RemoveStaging(half(t, dir)); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("there is left %v, error %v", left, err)
		}
	})
	t.Run("by the next checkpoint", func(t *testing.T) {
		dir := t.TempDir()
		half(t, dir)
		target, err := NewTarget(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Abort(); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("there is left %v, error %v", left, err)
		}
	})
	t.Run("not once the manifest has moved", func(t *testing.T) {
		dir := t.TempDir()
		staging := half(t, dir)
		for _, name := range []string{"pages-1.img", ManifestName} {
			if err := os.Rename(filepath.Join(staging, name), filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		if err := RemoveStaging(staging); err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 3 {
			t.Errorf("there is left %v, error %v", left, err)
		}
	})
}

func TestParseAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		iface, address string
		ok             bool
	}{
		"IPv4":               {"eth0", "192.0.2.2", true},
		"IPv6":               {"eth0.100", "2001:db8::2", true},
		"the longest name":   {"abcdefghijklmno", "192.0.2.2", true},
		"a longer one":       {"abcdefghijklmnop", "192.0.2.2", false},
		"no name":            {"", "192.0.2.2", false},
		"a path":             {"../eth0", "192.0.2.2", false},
		"an escape sequence": {"eth\x1b0", "192.0.2.2", false},
		"no address":         {"eth0", "", false},
		"a zone":             {"eth0", "fe80::1%eth0", false},
		"a port":             {"eth0", "192.0.2.2:80", false},
	} {
		a, err := ParseAddress(tc.iface, tc.address)
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v, %v", name, a, err)
		}
	}
}
