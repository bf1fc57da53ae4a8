// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testfuse"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// A container that serves a file system itself is looked at while its server is
// frozen.
func TestALookTouchesNothingThatAFrozenProcessServes(t *testing.T) {
	dir := t.TempDir()
	served := filepath.Join(dir, "served")
	must(t, os.Mkdir(served, 0o700))
	server := testfuse.Mount(t, served)
	local := create(t, filepath.Join(dir, "local"))
	kept := create(t, filepath.Join(dir, "first"))
	must(t, os.Link(kept.Name(), filepath.Join(dir, "second")), os.Remove(kept.Name()))
	// It has a file of the file system open, mapped, and its directory, and
	// listens on a socket there.
	file := filepath.Join(served, testfuse.Name)
	cmd := exec.Command("sh", "-c", "cd / && exec 5<>"+file+" 6<"+served+" && echo ready && read line")
	cmd.ExtraFiles = []*os.File{local, kept}
	testproc.Ready(t, cmd)
	mapped, err := os.Open(file)
	must(t, err)
	memory, err := unix.Mmap(int(mapped.Fd()), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_PRIVATE)
	must(t, err, mapped.Close())
	t.Cleanup(func() { _ = unix.Munmap(memory) })
	testfuse.Stop(t, server)

	testfuse.Ends(t, "a look", func() {
		c, err := Look(t.Context(), os.Getpid(), []int{os.Getpid(), cmd.Process.Pid, server.Pid}, nil)
		if err != nil {
			t.Error(err)
			return
		}
		if findings, err := c.CheckMounts(nil); err != nil || len(findings) > 0 {
			t.Error(findings, err)
		}
		findings, err := c.CheckNames(t.Context(), nil)
		if err != nil || len(findings) != 1 || !strings.Contains(findings[0].What, "has the device /dev/fuse open") {
			t.Error(findings, err)
		}
		if now := c.Names.Files[kept.Name()]; now != filepath.Join(dir, "second") {
			t.Errorf("the file beside it that has lost its name is %q now", now)
		}
		if _, _, err := c.CheckIPC([]*Process{c.Root}); err != nil {
			t.Error(err)
		}
		open, err := c.OpenFiles(t.Context())
		if err != nil {
			t.Error(err)
		}
		var listed []string
		for _, f := range open {
			listed = append(listed, string(f.GetPath()))
		}
		if !slices.Contains(listed, local.Name()) || slices.ContainsFunc(listed, func(name string) bool { return strings.HasPrefix(name, served) }) {
			t.Errorf("open files %q", listed)
		}
		if points, err := c.FileMounts(t.Context()); err != nil || slices.Contains(points, served) {
			t.Error(points, err)
		}
		if files, err := c.WrittenFiles(t.Context()); err != nil || len(files) > 0 {
			t.Errorf("files shared by the host: %v, %v", files, err)
		}
	})
}

// Those that are given may be of any kind: what a workload mounts itself may be
// made of a file that it serves itself.
func TestWhichMountsAnswer(t *testing.T) {
	table := &mountTable{given: map[[2]int]bool{{8, 1}: true, {0, 60}: true}}
	for line, want := range map[string]bool{
		"1 0 0:41 / / rw - virtiofs none rw":          true,
		"1 0 0:42 / /t rw - tmpfs none rw":            true,
		"1 0 0:42 / /p rw - proc none rw":             true,
		"1 0 8:1 / /disk rw - ext4 /dev/vda rw":       true,
		"1 0 7:1 / /loop rw - ext4 /dev/loop0 rw":     false,
		"1 0 0:60 / /layers rw - overlay o rw":        true,
		"1 0 0:61 / /made rw - overlay o rw":          false,
		"1 0 0:62 / /f rw - fuse.sshfs x rw":          false,
		"1 0 0:62 / /f rw - fuse x rw":                false,
		"1 0 0:63 / /nfs rw - nfs4 server:/ rw":       false,
		"1 0 0:60 / /nfs rw - nfs4 server:/ rw":       false,
		"1 0 0:64 / /nobody-knows rw - whatever w rw": false,
		"1 0 0:65 / /auto rw - autofs systemd-1 rw":   false,
	} {
		if have := table.answers(parseMounts(t, line)[0]); have != want {
			t.Errorf("%s: %v", line, have)
		}
	}
	if table.answers(nil) {
		t.Error("a mount that is not known answers")
	}
	table.given = nil
	if !table.answers(parseMounts(t, "1 0 7:1 / /d rw - ext4 /dev/loop0 rw")[0]) {
		t.Error("without a list of the given mounts, all are")
	}
}

// A mount namespace of its own hides nothing.
func TestMountsOfANestedNamespaceAreFound(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes a mount namespace")
	}
	dir := t.TempDir()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "mkdir "+dir+"/l "+dir+"/u "+dir+"/w "+dir+"/m; mount -t tmpfs t "+dir+"/u; mkdir "+dir+"/u/u "+dir+"/u/w; mount -t overlay -o lowerdir="+dir+"/l,upperdir="+dir+"/u/u,workdir="+dir+"/u/w o "+dir+"/m && echo ready && read line")
	testproc.Ready(t, cmd)
	var points []Point
	self, err := Mounts(os.Getpid())
	must(t, err)
	for _, m := range self {
		points = append(points, NewPoint(m))
	}
	c, err := LookAtFiles(t.Context(), os.Getpid(), []int{os.Getpid(), cmd.Process.Pid}, points)
	must(t, err)
	findings, err := c.CheckMounts(nil)
	must(t, err)
	if len(findings) != 1 || !strings.Contains(findings[0].What, "overlay at "+dir+"/m") {
		t.Errorf("findings %v", findings)
	}
}
