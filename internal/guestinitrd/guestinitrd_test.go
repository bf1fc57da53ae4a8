// SPDX-License-Identifier: Apache-2.0

package guestinitrd

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// file is what the kernel has unpacked: its type and permissions as in st_mode,
// and its content.
type file struct {
	mode    uint64
	content string
}

// unpack unpacks an initrd as the kernel does (init/initramfs.c,
// unpack_to_rootfs): archives one after the other, with zeros between them, and
// uncompressed ones at a multiple of four.
func unpack(t *testing.T, data []byte) map[string]file {
	t.Helper()
	files := map[string]file{}
	for at := 0; at < len(data); {
		switch {
		case data[at] == 0:
			at++
		case data[at] == '0' && at%4 == 0:
			at += unpackArchive(t, data[at:], files)
		default:
			in := bytes.NewReader(data[at:])
			z, err := gzip.NewReader(in)
			if err != nil {
				t.Fatalf("at %d: %v", at, err)
			}
			z.Multistream(false)
			archive, err := io.ReadAll(z)
			if err != nil {
				t.Fatalf("at %d: %v", at, err)
			}
			unpackArchive(t, archive, files)
			at = len(data) - in.Len()
		}
	}
	return files
}

// unpackArchive unpacks an archive, and returns where it ends.
func unpackArchive(t *testing.T, data []byte, files map[string]file) int {
	t.Helper()
	at := 0
	for {
		if at+110 > len(data) || string(data[at:at+6]) != "070701" {
			t.Fatalf("at %d of an archive there is no header", at)
		}
		var numbers [13]uint64
		for i := range numbers {
			n, err := strconv.ParseUint(string(data[at+6+8*i:at+14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			numbers[i] = n
		}
		mode, owner, group, size, name := numbers[1], numbers[2], numbers[3], int(numbers[6]), int(numbers[11])
		if owner != 0 || group != 0 {
			t.Errorf("at %d: belongs to %d:%d", at, owner, group)
		}
		path := string(data[at+110 : at+110+name-1])
		if data[at+110+name-1] != 0 {
			t.Fatalf("%q does not end", path)
		}
		at = (at + 110 + name + 3) / 4 * 4
		if path == "TRAILER!!!" {
			return at
		}
		if parent := filepath.Dir(path); parent != "." && files[parent].mode&0o170000 != 0o040000 {
			t.Errorf("%s comes before its directory", path)
		}
		files[path] = file{mode, string(data[at : at+size])}
		at = (at + size + 3) / 4 * 4
	}
}

// bundle makes a directory with the names of a guest bundle. All its files can
// be changed by everybody.
func bundle(t *testing.T, agent string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range append(slices.Clone(programs), "agent.json") {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o777), os.WriteFile(path, []byte(name+agent), 0o666)); err != nil {
			t.Fatal(err)
		}
		if name != "agent.json" {
			if err := os.Chmod(path, 0o777); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "criu/lib"), 0o777), os.Symlink("libc.so.6", filepath.Join(dir, "criu/lib/libc.so"))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// kataInitrd is an initrd of Kata's: an archive with one file.
func kataInitrd(t *testing.T, compressed bool) string {
	t.Helper()
	var c cpio
	c.add("/init", 0o755, []byte("the agent of Kata"))
	data := c.end()
	if compressed {
		var err error
		if data, err = compress(data); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "kata-containers-initrd.img")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func read1(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The guest has what Kata's initrd has and the bundle, which belongs to root and
// which nobody else can change.
func TestAppend(t *testing.T) {
	for name, compressed := range map[string]bool{"compressed": true, "plain": false} {
		t.Run(name, func(t *testing.T) {
			base := kataInitrd(t, compressed)
			before := read1(t, base)
			o := &Options{Base: base, Bundle: bundle(t, ""), Version: "1.2.3", Out: filepath.Join(t.TempDir(), "share", Name)}
			if _, err := Append(o); err != nil {
				t.Fatal(err)
			}
			made := read1(t, o.Out)
			if !bytes.HasPrefix(made, before) || !bytes.Equal(read1(t, base), before) {
				t.Error("Kata's initrd is not what it was")
			}
			files := unpack(t, made)
			for path, want := range map[string]file{
				"init": {0o100755, "the agent of Kata"},
				"opt":  {0o040755, ""}, "opt/kata-checkpoint": {0o040755, ""}, "opt/kata-checkpoint/guest": {0o040755, ""},
				"opt/kata-checkpoint/guest/bin/kata-checkpoint-agent":                                   {0o100755, "bin/kata-checkpoint-agent"},
				"opt/kata-checkpoint/guest/hooks/prestart/kata-checkpoint-agent-hook":                   {0o100755, "hooks/prestart/kata-checkpoint-agent-hook"},
				"opt/kata-checkpoint/guest/agent.json":                                                  {0o100644, "agent.json"},
				"opt/kata-checkpoint/guest/criu/lib/libc.so":                                            {0o120777, "libc.so.6"},
				strings.TrimPrefix(filepath.Join(HookPath, "prestart/kata-checkpoint-agent-hook"), "/"): {0o100755, "hooks/prestart/kata-checkpoint-agent-hook"},
			} {
				if files[path] != want {
					t.Errorf("%s is %o %q", path, files[path].mode, files[path].content)
				}
			}
			r, err := Read(o.Out)
			if err != nil || r.Version != "1.2.3" || r.Base != int64(len(before)) {
				t.Errorf("the record is %+v, %v", r, err)
			}
			if _, err := Read(base); !errors.Is(err, ErrNoBundle) {
				t.Errorf("Kata's initrd: %v", err)
			}

			// Made once more, it is the same; of what was made, too.
			if _, err := Append(o); err != nil || !bytes.Equal(read1(t, o.Out), made) {
				t.Errorf("made once more, it is another one: %v", err)
			}
			o.Base = o.Out
			if _, err := Append(o); err != nil || !bytes.Equal(read1(t, o.Out), made) {
				t.Errorf("made of itself, it is another one: %v", err)
			}
			// An upgrade.
			o.Bundle, o.Version = bundle(t, " of the next release"), "1.3.0"
			next, err := Append(o)
			if err != nil || next.Bundle == r.Bundle || next.Base != r.Base {
				t.Errorf("%+v, %v", next, err)
			}
			text := unpack(t, read1(t, o.Out))["opt/kata-checkpoint/guest/bin/kata-checkpoint-agent"].content
			if !strings.HasSuffix(text, "next release") || bytes.Count(read1(t, o.Out), []byte(newc)) > bytes.Count(made, []byte(newc)) {
				t.Errorf("the guest has the agent %q", text)
			}
		})
	}
}

// What other programs read is what was written.
func TestCpioReadsIt(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("there is no cpio")
	}
	o := &Options{Base: kataInitrd(t, false), Bundle: bundle(t, ""), Version: "1", Out: filepath.Join(t.TempDir(), Name)}
	r, err := Append(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "cpio", "--quiet", "-t")
	cmd.Stdin = bytes.NewReader(read1(t, o.Out)[align(int(r.Base), blockSize):])
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "opt/kata-checkpoint/guest/criu/bin/criu\n") {
		t.Errorf("cpio: %v: %s", err, out)
	}
}

func TestRefused(t *testing.T) {
	good := func() *Options {
		return &Options{Base: kataInitrd(t, true), Bundle: bundle(t, ""), Version: "1", Out: filepath.Join(t.TempDir(), Name)}
	}
	with := func(text string) func(*Options) {
		return func(o *Options) {
			if err := os.WriteFile(o.Base, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		fault func(*Options)
		code  errcode.Code
		text  string
	}{
		"no initrd":       {func(o *Options) { o.Base += "x" }, errcode.InitrdBase, "no such file"},
		"a disk image":    {with(strings.Repeat("\x00", 1024)), errcode.InitrdBase, "neither a cpio archive nor compressed"},
		"an empty file":   {with(""), errcode.InitrdBase, "neither a cpio archive nor compressed"},
		"Kata's own file": {func(o *Options) { o.Out = o.Base }, errcode.InitrdBase, "--out"},
		"its own file by a link": {func(o *Options) {
			if err := os.Symlink(o.Base, o.Out); err != nil {
				t.Fatal(err)
			}
		}, errcode.InitrdBase, "--out"},
		"no bundle":    {func(o *Options) { o.Bundle += "x" }, errcode.NoGuestBundle, "--bundle"},
		"not a bundle": {func(o *Options) { o.Bundle = t.TempDir() }, errcode.NoGuestBundle, "--bundle"},
		"a linked hook": {func(o *Options) {
			hook := filepath.Join(o.Bundle, "hooks/prestart/kata-checkpoint-agent-hook")
			if err := errors.Join(os.Remove(hook), os.Symlink("../../bin/kata-checkpoint-agent", hook)); err != nil {
				t.Fatal(err)
			}
		}, errcode.NoGuestBundle, "not an executable file"},
		"a record that is cut off": {func(o *Options) {
			record := &Record{Version: "1", Base: 600, Bundle: "x"}
			note, err := record.archive()
			if err != nil {
				t.Fatal(err)
			}
			with(newc + strings.Repeat("\x00", 594) + string(note[:160]))(o)
		}, errcode.InitrdBase, "cut off"},
	} {
		t.Run(name, func(t *testing.T) {
			o := good()
			tc.fault(o)
			before, _ := os.ReadFile(o.Base)
			_, err := Append(o)
			if errcode.Of(err) != tc.code || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("%v, not %v with %q", err, tc.code, tc.text)
			}
			if after, _ := os.ReadFile(o.Base); !bytes.Equal(before, after) {
				t.Error("Kata's initrd is not what it was")
			}
			if _, err := os.Lstat(o.Out + ".new"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("something is left: %v", err)
			}
		})
	}
}
