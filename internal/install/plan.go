// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/aymanbagabas/go-udiff"
	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Plan is what has to be done on a node.
type Plan struct {
	// Notes are worth knowing; Todo is what the operator has to do, because it
	// concerns what others have written.
	Notes, Todo []string
	// RuntimeClass is for Kubernetes.
	RuntimeClass string

	o       *Options
	record  *record // as it is now
	next    *record // as it will be
	changes []change
	// release is the directory of the guest bundle; newRelease means that it is
	// to be made from tree.
	tree       *tree
	release    string
	newRelease bool
	stale      []string // directories of earlier releases that nobody uses
	uninstall  bool
}

// change is one file that is made, replaced or removed.
type change struct {
	path     string
	old, new *content
}

func (p *Plan) notef(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

func (p *Plan) todof(format string, args ...any) {
	p.Todo = append(p.Todo, fmt.Sprintf(format, args...))
}

// Empty reports whether all is as it should be.
func (p *Plan) Empty() bool {
	return len(p.changes) == 0 && !p.newRelease && len(p.stale) == 0
}

// compare finds out what differs between the node and what should be there.
func (p *Plan) compare(entries []*entry) error {
	p.next = &record{Version: p.o.Version, Settings: p.o.settings(), Files: map[string][]string{}, Dirs: slices.Clone(p.record.Dirs), Releases: slices.Clone(p.record.Releases)}
	var inTheWay []string
	planned := map[string]bool{}
	for _, e := range entries {
		planned[e.path] = true
		now, err := p.o.look(e.path)
		if err != nil {
			if errors.Is(err, fs.ErrPermission) {
				return err
			}
			inTheWay = append(inTheWay, e.path)
			continue
		}
		want := e.content()
		recorded := len(p.record.Files[e.path]) > 0
		same := now.exists && now.digest() == want.digest()
		switch {
		case !now.exists, same && recorded && e.link == "" && now.mode.Perm() != e.mode:
			p.changes = append(p.changes, change{path: e.path, old: now, new: want})
		case same && recorded:
		case same || (e.yields && !recorded):
			continue // somebody else's
		case p.record.wrote(e.path, now.digest()):
			p.changes = append(p.changes, change{path: e.path, old: now, new: want})
		case recorded:
			p.notef("%s was changed since it was installed and stays as it is", e.path)
			p.next.Files[e.path] = p.record.Files[e.path]
			continue
		default:
			inTheWay = append(inTheWay, e.path)
			continue
		}
		p.next.Files[e.path] = []string{want.digest()}
	}
	if err := conflicts(inTheWay); err != nil {
		return err
	}
	if err := p.leftovers(planned); err != nil {
		return err
	}
	return p.releases()
}

// leftovers are files of an earlier installation that this one lacks.
func (p *Plan) leftovers(planned map[string]bool) error {
	for _, path := range slices.Sorted(maps.Keys(p.record.Files)) {
		if planned[path] {
			continue
		}
		now, err := p.o.look(path)
		if err != nil {
			return err
		}
		switch {
		case !now.exists:
		case p.record.wrote(path, now.digest()):
			p.changes = append(p.changes, change{path: path, old: now, new: &content{}})
		default:
			p.next.Files[path] = p.record.Files[path]
			p.notef("%s was changed since it was installed and stays as it is", path)
		}
	}
	return nil
}

// releases decides which guest bundles are made and which are removed. A VM has
// its bundle mounted, and needs it until its first checkpoint.
func (p *Plan) releases() error {
	if p.release != "" {
		if _, err := os.Stat(p.o.at(p.release)); errors.Is(err, fs.ErrNotExist) {
			p.newRelease = true
		} else if err != nil {
			return err
		}
		if !slices.Contains(p.next.Releases, p.release) {
			p.next.Releases = append(p.next.Releases, p.release)
		}
	}
	for _, dir := range p.record.Releases {
		if dir == p.release {
			continue
		}
		used, err := p.o.mounted(dir)
		if err != nil {
			return err
		}
		if used {
			p.notef("%s stays until the VMs that were started with it have ended: the next install removes it", dir)
			continue
		}
		p.stale = append(p.stale, dir)
		p.next.Releases = slices.DeleteFunc(p.next.Releases, func(d string) bool { return d == dir })
	}
	return nil
}

// Diff shows what would be done.
func (p *Plan) Diff(w io.Writer) error {
	var b strings.Builder
	if p.newRelease {
		fmt.Fprintf(&b, "new directory %s: the guest bundle, %d MiB\n", p.release, p.tree.bytes>>20)
	}
	for _, c := range p.changes {
		b.WriteString(c.diff())
	}
	for _, dir := range p.stale {
		fmt.Fprintf(&b, "remove directory %s\n", dir)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Summary lists what would be done, or was done, a line a file.
func (p *Plan) Summary() []string {
	var lines []string
	if p.newRelease {
		lines = append(lines, "write "+p.release)
	}
	for _, c := range p.changes {
		what := "write"
		switch {
		case !c.new.exists:
			what = "remove"
		case c.old.exists:
			what = "replace"
		}
		lines = append(lines, what+" "+c.path)
	}
	for _, dir := range p.stale {
		lines = append(lines, "remove "+dir)
	}
	return lines
}

func (c *change) diff() string {
	if c.old.text() && c.new.text() {
		from, to := "a"+c.path, "b"+c.path
		if !c.old.exists {
			from = "/dev/null"
		}
		if !c.new.exists {
			to = "/dev/null"
		}
		return udiff.Unified(from, to, string(c.old.data), string(c.new.data))
	}
	switch {
	case !c.old.exists:
		return fmt.Sprintf("new file %s: %s\n", c.path, c.new)
	case !c.new.exists:
		return fmt.Sprintf("remove file %s: %s\n", c.path, c.old)
	}
	return fmt.Sprintf("replace file %s: %s by %s\n", c.path, c.old, c.new)
}

// text reports whether the content can be shown as a diff.
func (c *content) text() bool {
	return c.mode&fs.ModeSymlink == 0 && len(c.data) < 1<<20 && utf8.Valid(c.data) && bytes.IndexByte(c.data, 0) < 0
}

func (c *content) String() string {
	if c.mode&fs.ModeSymlink != 0 {
		return "a symbolic link to " + c.link
	}
	return fmt.Sprintf("%d bytes, SHA-256 %s", len(c.data), digestOf(c.data)[:12])
}

// Apply does what is planned. If it is interrupted, repeating it completes it,
// and an uninstallation undoes it.
func (p *Plan) Apply() error {
	if p.Empty() && !p.uninstall {
		return nil
	}
	unlock, err := p.o.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.intend(); err != nil {
		return err
	}
	if p.newRelease {
		if err := p.makeParents(p.release); err != nil {
			return err
		}
		if err := p.tree.copyTo(p.o.at(p.release)); err != nil {
			return err
		}
	}
	for _, c := range p.changes {
		if err := p.carryOut(&c); err != nil {
			return err
		}
	}
	for _, dir := range p.stale {
		if err := os.RemoveAll(p.o.at(dir)); err != nil {
			return err
		}
		_ = os.Remove(p.o.at(filepath.Dir(dir))) // the release's directory, which has nothing else
	}
	if !p.uninstall {
		return p.writeRecord(p.next)
	}
	if err := os.Remove(p.o.at(p.o.recordPath())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, dir := range slices.Backward(p.record.Dirs) {
		_ = os.Remove(p.o.at(dir)) // unless somebody else has put something there
	}
	return nil
}

// intend writes down what is about to be written.
func (p *Plan) intend() error {
	if p.uninstall {
		return nil
	}
	both := &record{Version: p.next.Version, Settings: p.next.Settings, Files: maps.Clone(p.record.Files), Releases: slices.Clone(p.record.Releases)}
	for path, digests := range p.next.Files {
		both.Files[path] = slices.Compact(slices.Concat(both.Files[path], digests))
	}
	for _, dir := range p.next.Releases {
		if !slices.Contains(both.Releases, dir) {
			both.Releases = append(both.Releases, dir)
		}
	}
	paths := []string{p.o.recordPath(), p.release}
	for _, c := range p.changes {
		paths = append(paths, c.path)
	}
	for _, path := range paths {
		for _, dir := range p.o.missingParents(path) {
			if !slices.Contains(p.next.Dirs, dir) {
				p.next.Dirs = append(p.next.Dirs, dir)
			}
		}
	}
	slices.Sort(p.next.Dirs) // parents first
	both.Dirs = p.next.Dirs
	if err := p.makeParents(p.o.recordPath()); err != nil {
		return err
	}
	return p.writeRecord(both)
}

func (p *Plan) writeRecord(r *record) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	return writeFile(p.o.at(p.o.recordPath()), data, 0o644)
}

// missingParents are the directories above a path that do not exist.
func (o *Options) missingParents(path string) (dirs []string) {
	for dir := filepath.Dir(path); dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		if _, err := os.Stat(o.at(dir)); err == nil {
			break
		}
		dirs = append(dirs, dir)
	}
	return dirs
}

func (p *Plan) makeParents(path string) error {
	for _, dir := range slices.Backward(p.o.missingParents(path)) {
		if err := os.Mkdir(p.o.at(dir), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (p *Plan) carryOut(c *change) error {
	at := p.o.at(c.path)
	if !c.new.exists {
		return os.Remove(at)
	}
	if err := p.makeParents(c.path); err != nil {
		return err
	}
	if c.new.mode&fs.ModeSymlink == 0 {
		return writeFile(p.o.at(c.path), c.new.data, c.new.mode)
	}
	// A link is replaced by another, so that there always is one.
	at = p.o.at(c.path)
	next := filepath.Join(filepath.Dir(at), "."+filepath.Base(at)+".new")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(c.new.link, next); err != nil {
		return err
	}
	return os.Rename(next, at)
}

// writeFile replaces a file as a whole: whoever executes or reads the old one
// keeps it.
func writeFile(path string, data []byte, mode fs.FileMode) error {
	file, err := atomicfile.New(path, mode)
	if err != nil {
		return err
	}
	if _, err := file.Write(data); err != nil {
		_ = file.Cancel()
		return err
	}
	return file.Close()
}

// lock keeps other installations on the node waiting for their turn away.
func (o *Options) lock() (unlock func(), err error) {
	root, err := os.Open(filepath.Clean("/" + o.Root))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(root.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		root.Close()
		return nil, errcode.InstallRunning.Errorf("another installation is in progress: repeat the command when it is done: %w", err)
	}
	return func() { root.Close() }, nil
}
