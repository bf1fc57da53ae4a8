// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// operation is one of a [disk], in directories that are relative to the top.
type operation struct {
	what    string
	dirs    []string
	names   []string
	content []byte // of a new file
}

func (o operation) String() string { return fmt.Sprintf("%s %q in %q", o.what, o.names, o.dirs) }

// recorder does what the kernel does, and records it. What is removed with its
// directory is removed file by file, in one order or the other.
type recorder struct {
	kernel
	t       *testing.T
	top     string
	reverse bool

	mu  sync.Mutex
	ops []operation
}

func (r *recorder) add(what string, content []byte, names []string, dirs ...*os.File) {
	o := operation{what: what, names: names, content: content}
	for _, d := range dirs {
		path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
		if err == nil {
			path, err = filepath.Rel(r.top, path)
		}
		if err != nil {
			r.t.Fatal(err)
		}
		o.dirs = append(o.dirs, path)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, o)
}

func (r *recorder) create(dir *os.File, name string, content []byte) error {
	r.add("create", content, []string{name}, dir)
	return r.kernel.create(dir, name, content)
}

func (r *recorder) rename(from, to *os.File, name string) error {
	r.add("rename", nil, []string{name}, from, to)
	return r.kernel.rename(from, to, name)
}

func (r *recorder) exchange(dir *os.File, a, b string) error {
	r.add("exchange", nil, []string{a, b}, dir)
	return r.kernel.exchange(dir, a, b)
}

func (r *recorder) remove(dir *os.File, name string) error {
	r.add("remove", nil, []string{name}, dir)
	return r.kernel.remove(dir, name)
}

func (r *recorder) removeAll(dir *os.File, name string) error {
	inside, err := openDirBeneath(dir, name)
	if err != nil {
		return err
	}
	defer inside.Close()
	names, err := list(inside, 1000)
	if err != nil {
		return err
	}
	if r.reverse {
		slices.Reverse(names)
	}
	for _, n := range names {
		r.add("remove", nil, []string{n}, inside)
	}
	r.add("remove", nil, []string{name}, dir)
	return r.kernel.removeAll(dir, name)
}

func (r *recorder) sync(dir *os.File, name string) error {
	r.add("sync", nil, []string{name}, dir)
	return r.kernel.sync(dir, name)
}

func (r *recorder) syncDir(dir *os.File) error {
	r.add("syncDir", nil, nil, dir)
	return r.kernel.syncDir(dir)
}

// durable returns how many of the first n operations are on the disk for sure:
// all up to the first that changed a directory which was not synced since.
func durable(ops []operation) int {
	for i, o := range ops {
		if o.what == "sync" || o.what == "syncDir" {
			continue
		}
		for _, dir := range o.dirs {
			if !slices.ContainsFunc(ops[i+1:], func(s operation) bool { return s.what == "syncDir" && s.dirs[0] == dir }) {
				return i
			}
		}
	}
	return len(ops)
}

// state is what may be on the disk of a sequence of operations: the names that
// the first of them have made, but for one of those that were not synced.
type state struct{ first, without int }

// states returns what a power loss after operations may leave: what is durable,
// and of the rest the names of some more, or of all but one, because not every
// file system writes names in their order.
func states(ops []operation) (out []state) {
	sure := durable(ops)
	for n := sure; n <= len(ops); n++ {
		out = append(out, state{n, -1})
	}
	for i := sure; i < len(ops); i++ {
		out = append(out, state{len(ops), i})
	}
	return out
}

// replay lays out a state in an empty directory, based on a copy of before. The
// content of files that were in staging is there only if it was synced. It
// reports false for a state that cannot be: an operation needs the missing one.
func replay(t *testing.T, before, staging, top string, ops []operation, s state) bool {
	t.Helper()
	synced := make(map[string]bool)
	for _, o := range ops {
		if o.what == "sync" {
			synced[filepath.Join(o.dirs[0], o.names[0])] = true
		}
	}
	err := os.CopyFS(top, os.DirFS(before))
	entries, _ := os.ReadDir(filepath.Join(top, staging)) // there may be none
	for _, e := range entries {
		if path := filepath.Join(staging, e.Name()); !synced[path] {
			err = errors.Join(err, os.Truncate(filepath.Join(top, path), 0))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range ops[:s.first] {
		if i == s.without {
			continue
		}
		at := func(dir, name int) string { return filepath.Join(top, o.dirs[dir], o.names[name]) }
		switch o.what {
		case "create":
			content := o.content
			if !synced[filepath.Join(o.dirs[0], o.names[0])] {
				content = nil
			}
			err = os.WriteFile(at(0, 0), content, 0o600)
		case "rename":
			err = os.Rename(at(0, 0), at(1, 0))
		case "exchange":
			err = errors.Join(os.Rename(at(0, 0), top+"-x"), os.Rename(at(0, 1), at(0, 0)), os.Rename(top+"-x", at(0, 1)))
		case "remove":
			err = os.Remove(at(0, 0))
		}
		if err != nil && s.without >= 0 {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return true
}

// content returns what is in the inventory of a complete image set, "" where
// there is none.
func content(t *testing.T, dir string) string {
	t.Helper()
	stage := filepath.Join(memory(t), "stage")
	if stageFrom(t, dir, stage) != nil {
		return ""
	}
	data, err := os.ReadFile(filepath.Join(stage, InventoryName))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// A power loss at any moment of a checkpoint leaves the earlier image set or the
// new one, and a directory in which the next checkpoint can be made. Once Commit
// has returned, it leaves the new one.
func TestPowerLoss(t *testing.T) {
	for name, earlier := range map[string]string{"a new directory": "", "an earlier checkpoint": "old"} {
		for _, reverse := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, removed in reverse %v", name, reverse), func(t *testing.T) {
				powerLoss(t, earlier, reverse)
			})
		}
	}
}

func powerLoss(t *testing.T, earlier string, reverse bool) {
	top := memory(t)
	dir := filepath.Join(top, "set")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if earlier != "" {
		commit(t, dir, map[string]string{InventoryName: earlier, "core-1.img": "of the earlier one"})
	}
	r := &recorder{t: t, top: top, reverse: reverse}
	target, err := newTarget(dir, r)
	if err != nil {
		t.Fatal(err)
	}
	m := &Manifest{}
	for name, content := range map[string]string{InventoryName: "new", "pages-1.img": "of the new one", "files.img": ""} {
		write(t, filepath.Join(target.Dir().Name(), name), content)
		m.Files = append(m.Files, File{Name: name, Size: int64(len(content)), BLAKE3: digest(content)})
	}
	staging, err := filepath.Rel(top, target.Dir().Name())
	if err != nil {
		t.Fatal(err)
	}
	before := memory(t)
	if err := os.CopyFS(before, os.DirFS(top)); err != nil {
		t.Fatal(err)
	}
	if err := target.Commit(t.Context(), m, newKey(t)); err != nil {
		t.Fatal(err)
	}
	committed := len(r.ops)
	if err := target.Abort(); err != nil {
		t.Fatal(err)
	}

	seen := map[string]bool{}
	for end := range len(r.ops) + 1 {
		for i, st := range states(r.ops[:end]) {
			after := filepath.Join(memory(t), "top")
			if !replay(t, before, staging, after, r.ops[:end], st) {
				continue
			}
			got := content(t, filepath.Join(after, "set"))
			seen[got] = true
			if got != earlier && got != "new" || end >= committed && got != "new" {
				t.Errorf("there is %q", got)
			}
			if _, err := os.Stat(filepath.Join(after, "set", ManifestName)); err == nil && got == "" {
				t.Error("there is a manifest of files that are not there")
			}
			if i%2 == 1 { // as `delete` does, where it still runs
				if err := RemoveStaging(filepath.Join(after, staging)); err != nil {
					t.Error(err)
				}
			}
			checkNext(t, after)
			if t.Failed() {
				t.Fatalf("a power loss after %d operations of %v, in the state %+v", end, r.ops, st)
			}
		}
	}
	if len(seen) != 2 || !seen[earlier] || !seen["new"] {
		t.Errorf("the states were %v", seen)
	}
}

// checkNext makes the next checkpoint in the directory set below top.
func checkNext(t *testing.T, top string) {
	t.Helper()
	commit(t, filepath.Join(top, "set"), map[string]string{InventoryName: "next"})
	if got := content(t, filepath.Join(top, "set")); got != "next" {
		t.Errorf("the next checkpoint leaves %q", got)
	}
	if diff := cmp.Diff([]string{"set"}, names(t, top)); diff != "" {
		t.Errorf("there is left: %s", diff)
	}
}

// So does a power loss while what an earlier one has left is removed.
func TestPowerLossWhileCleaningUp(t *testing.T) {
	before := memory(t)
	dir := filepath.Join(before, "set")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	halfACommit(t, dir, `["inventory.img","core-1.img","pages-1.img","kata-checkpoint.json"]`)
	write(t, filepath.Join(dir, "core-1.img"), "moved, too")
	for _, reverse := range []bool{false, true} {
		top := filepath.Join(memory(t), "top")
		if err := os.CopyFS(top, os.DirFS(before)); err != nil {
			t.Fatal(err)
		}
		r := &recorder{t: t, top: top, reverse: reverse}
		home, err := openDir(filepath.Join(top, "set"))
		if err != nil {
			t.Fatal(err)
		}
		if busy, err := removeUnfinished(r, home); busy || err != nil {
			t.Fatal(busy, err)
		}
		home.Close()
		for end := range len(r.ops) + 1 {
			for _, st := range states(r.ops[:end]) {
				after := filepath.Join(memory(t), "top")
				if !replay(t, before, "none", after, r.ops[:end], st) {
					continue
				}
				checkNext(t, after)
				if t.Failed() {
					t.Fatalf("a power loss after %d operations of %v, in the state %+v", end, r.ops, st)
				}
			}
		}
	}
}

// What a release left that did not wait for the disk: names that are on the disk
// and contents that are not.
func TestPowerLossOfAnEarlierRelease(t *testing.T) {
	for name, lay := range map[string]func(dir string) error{
		"while the files were moved": func(dir string) error {
			staging := filepath.Join(dir, stagingPrefix+"0123456789abcdef")
			return errors.Join(os.Mkdir(staging, 0o700), os.WriteFile(filepath.Join(staging, ManifestName), nil, 0o600),
				os.WriteFile(filepath.Join(staging, committingName), nil, 0o600), os.WriteFile(filepath.Join(dir, InventoryName), nil, 0o600))
		},
		"after all were moved": func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, ManifestName), nil, 0o600), os.WriteFile(filepath.Join(dir, InventoryName), nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "set")
			if err := errors.Join(os.Mkdir(dir, 0o700), lay(dir)); err != nil {
				t.Fatal(err)
			}
			commit(t, dir, map[string]string{InventoryName: "next"})
			if got := content(t, dir); got != "next" {
				t.Errorf("the next checkpoint leaves %q", got)
			}
		})
	}
	t.Run("and delete", func(t *testing.T) {
		dir := t.TempDir()
		staging := filepath.Join(dir, stagingPrefix+"0123456789abcdef")
		err := errors.Join(os.Mkdir(staging, 0o700), os.WriteFile(filepath.Join(staging, ManifestName), nil, 0o600),
			os.WriteFile(filepath.Join(staging, committingName), nil, 0o600), os.WriteFile(filepath.Join(dir, InventoryName), nil, 0o600))
		if err := errors.Join(err, RemoveStaging(staging)); err != nil {
			t.Fatal(err)
		}
		if left := names(t, dir); len(left) > 0 {
			t.Errorf("there is left %v", left)
		}
	})
}

// The directory above an image directory may be somebody else's, who can put
// something else in its place at any time. What is written stays in the
// directory that was checked.
func TestCommitIntoADirectoryThatIsSwapped(t *testing.T) {
	base, victim := t.TempDir(), filepath.Join(t.TempDir(), "profile.sh")
	write(t, victim, "# root's\n")
	path := filepath.Join(base, "set")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	target, err := NewTarget(path)
	if err != nil {
		t.Fatal(err)
	}
	staging := filepath.Base(target.Dir().Name())
	write(t, filepath.Join(path, staging, InventoryName), "i")
	moved := filepath.Join(base, "moved")
	if err := errors.Join(os.Rename(path, moved), os.MkdirAll(filepath.Join(base, "fake", staging), 0o755),
		os.Symlink(victim, filepath.Join(base, "fake", staging, ManifestName)), os.Symlink("fake", path)); err != nil {
		t.Fatal(err)
	}
	m := &Manifest{Files: []File{{Name: InventoryName, Size: 1, BLAKE3: digest("i")}}}
	if err := errors.Join(target.Commit(t.Context(), m, nil), target.Abort()); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(victim); err != nil || string(data) != "# root's\n" {
		t.Errorf("the file elsewhere is now %q (%v)", data, err)
	}
	if got := content(t, moved); got != "i" {
		t.Errorf("the directory that was checked has %q", got)
	}
}

// Nothing is written where others could replace it while it is written.
func TestDirectoriesOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give directories away")
	}
	const somebody = 65534
	lay := func(t *testing.T, change func(path string) error) string {
		path := filepath.Join(t.TempDir(), "set")
		if err := errors.Join(os.Mkdir(path, 0o700), change(path)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, tc := range map[string]struct {
		change func(path string) error
		err    string
	}{
		"root's":                       {func(string) error { return nil }, ""},
		"one that others read":         {func(p string) error { return os.Chmod(p, 0o755) }, ""},
		"somebody else's":              {func(p string) error { return os.Chown(p, somebody, 0) }, "belongs to the user 65534"},
		"one that a group writes":      {func(p string) error { return os.Chmod(p, 0o770) }, "can be written to by others"},
		"one that everybody writes":    {func(p string) error { return os.Chmod(p, 0o777) }, "can be written to by others"},
		"one like /tmp":                {func(p string) error { return os.Chmod(p, 0o777|fs.ModeSticky) }, ""},
		"one like /tmp, but of others": {func(p string) error { return errors.Join(os.Chmod(p, 0o777|fs.ModeSticky), os.Chown(p, somebody, 0)) }, "belongs to the user 65534"},
	} {
		t.Run(name, func(t *testing.T) {
			path := lay(t, tc.change)
			target, err := NewTarget(path)
			if err == nil {
				err = target.Abort()
			}
			logErr := WriteLog(path, DumpLogName, []byte("log"))
			if tc.err == "" {
				if err != nil || logErr != nil {
					t.Error(err, logErr)
				}
				return
			}
			wantError(t, err, tc.err)
			wantError(t, logErr, tc.err)
			if left := names(t, path); len(left) > 0 {
				t.Errorf("there is left %v", left)
			}
		})
	}
	t.Run("the one around an earlier checkpoint", func(t *testing.T) {
		path := newSet(t, someFiles)
		if err := os.Chown(filepath.Dir(path), somebody, 0); err != nil {
			t.Fatal(err)
		}
		_, err := NewTarget(path)
		wantError(t, err, "replace the earlier checkpoint", "belongs to the user 65534", "or name an empty directory")
	})
	t.Run("a staging directory of somebody else's", func(t *testing.T) {
		path := lay(t, func(p string) error { return os.Chmod(p, 0o777|fs.ModeSticky) })
		theirs := filepath.Join(path, stagingPrefix+"0123456789abcdef")
		if err := errors.Join(os.Mkdir(theirs, 0o700), os.Chown(theirs, somebody, 0)); err != nil {
			t.Fatal(err)
		}
		_, err := NewTarget(path)
		wantError(t, err, "is not empty")
		if left := names(t, path); len(left) != 1 {
			t.Errorf("there is left %v", left)
		}
	})
}

// A log that is in the way, or a link in its place, is replaced and never
// followed.
func TestWriteLog(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	write(t, victim, "root's")
	dir := filepath.Join(t.TempDir(), "work")
	if err := WriteLog(dir, DumpLogName, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, DumpLogName)), os.Symlink(victim, filepath.Join(dir, DumpLogName))); err != nil {
		t.Fatal(err)
	}
	if err := WriteLog(dir, DumpLogName, []byte("second")); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(filepath.Join(dir, DumpLogName))
	data, victimErr := os.ReadFile(victim)
	if err := errors.Join(err, victimErr); err != nil || string(log) != "second" || string(data) != "root's" {
		t.Errorf("the log is %q and the file elsewhere %q (%v)", log, data, err)
	}
}
