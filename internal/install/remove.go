// SPDX-License-Identifier: Apache-2.0

package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// ErrNotInstalled means that there is nothing to remove.
var ErrNotInstalled = errcode.NotInstalled.Wrap(errors.New("kata-checkpoint install has not installed anything here"))

// PrepareRemoval finds out what has to be done to leave the node as it was
// before the installation. Files that were changed since are only removed with
// force.
func PrepareRemoval(o *Options, force bool) (*Plan, error) {
	r, err := o.readRecord()
	if err != nil {
		return nil, err
	}
	if len(r.Files) == 0 && len(r.Releases) == 0 {
		return nil, fmt.Errorf("%w: there is no %s", ErrNotInstalled, o.recordPath())
	}
	running, err := o.running()
	if err != nil {
		return nil, err
	}
	if len(running) > 0 {
		return nil, errcode.SandboxesRun.Errorf("%d sandboxes run with kata-checkpoint (%s): remove their containers first, since without the shim nothing could end them", len(running), strings.Join(running, ", "))
	}
	p := &Plan{o: o, record: r, uninstall: true}
	if err := p.compare(nil); err != nil {
		return nil, err
	}
	p.Notes = nil
	if force {
		for path := range p.next.Files {
			now, err := o.look(path)
			if err != nil {
				return nil, err
			}
			p.changes = append(p.changes, change{path: path, old: now, new: &content{}})
		}
		return p, nil
	}
	var changed []string
	for path := range p.next.Files {
		changed = append(changed, path)
	}
	if slices.Sort(changed); len(changed) > 0 {
		return nil, errcode.Changed.Errorf("changed since they were installed: %s; keep copies of what you need and repeat with --remove-changed", strings.Join(changed, ", "))
	}
	if len(p.next.Releases) > 0 {
		return nil, errcode.SandboxesRun.Errorf("%s is mounted: remove the containers whose VMs use it first", strings.Join(p.next.Releases, ", "))
	}
	return p, nil
}

func (o *Options) proc() string {
	if o.Proc == "" {
		return "/proc"
	}
	return o.Proc
}

// RestartDue reports whether the containerd that runs has started before what is
// installed was written, as far as that is known: an earlier installation may
// have ended before it restarted containerd.
func (o *Options) RestartDue() bool {
	st, err := os.Stat(o.at(o.recordPath()))
	if err != nil {
		return false
	}
	processes, err := filepath.Glob(filepath.Join(o.proc(), "[0-9]*", "exe"))
	if err != nil {
		return false
	}
	for _, exe := range processes {
		target, err := os.Readlink(exe)
		if err != nil || filepath.Base(strings.TrimSuffix(target, " (deleted)")) != "containerd" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(exe)))
		if err != nil {
			continue
		}
		// The kernel knows it to the second.
		if started, err := procfs.Started(o.proc(), pid); err == nil && st.ModTime().After(started.Add(time.Second)) {
			return true
		}
	}
	return false
}

// running are the sandboxes with our shim, by their IDs.
func (o *Options) running() ([]string, error) {
	var ids []string
	err := o.shims(func(pid, exe string) error {
		if exe != filepath.Join(o.BinDir, check.ShimName) {
			return nil
		}
		cmdline, err := os.ReadFile(filepath.Join(o.proc(), pid, "cmdline"))
		if err != nil {
			return nil //nolint:nilerr // it has ended
		}
		id := "pid " + pid
		args := strings.Split(string(cmdline), "\x00")
		if i := slices.Index(args, "-id"); i >= 0 && i+1 < len(args) {
			id = args[i+1]
		}
		ids = append(ids, id)
		return nil
	})
	slices.Sort(ids)
	return slices.Compact(ids), err
}

// shims calls a function for each of containerd's shims, with the path of its
// binary.
func (o *Options) shims(each func(pid, exe string) error) error {
	processes, err := filepath.Glob(filepath.Join(o.proc(), "[0-9]*"))
	if err != nil {
		return err
	}
	for _, process := range processes {
		exe, err := os.Readlink(filepath.Join(process, "exe"))
		if err != nil {
			continue // a thread of the kernel, or a process that has ended
		}
		// What was replaced meanwhile is shown as deleted.
		exe = strings.TrimSuffix(exe, " (deleted)")
		if !strings.HasPrefix(filepath.Base(exe), "containerd-shim-") {
			continue
		}
		if err := each(filepath.Base(process), exe); err != nil {
			return err
		}
	}
	return nil
}

// mounted reports whether a guest bundle is in a sandbox. Kata's shims have the
// mounts, in containerd's mount namespace or in one of their own.
func (o *Options) mounted(dir string) (bool, error) {
	// DIR/RELEASE/guest, whatever file system DIR is on.
	suffix := filepath.Join("/", filepath.Base(filepath.Dir(dir)), filepath.Base(dir))
	used := false
	look := func(pid, _ string) error {
		file, err := os.Open(filepath.Join(o.proc(), pid, "mountinfo"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			return nil
		}
		if err != nil {
			return err
		}
		defer file.Close()
		mounts, err := mountinfo.GetMountsFromReader(file, func(m *mountinfo.Info) (skip, stop bool) {
			return !strings.HasSuffix(m.Root, suffix), false
		})
		if err != nil && !errors.Is(err, syscall.ESRCH) && !errors.Is(err, syscall.EINVAL) {
			return err
		}
		used = used || len(mounts) > 0
		return nil
	}
	if err := look("self", ""); err != nil {
		return false, err
	}
	return used, o.shims(look)
}

func chroot(root string) *syscall.SysProcAttr { return &syscall.SysProcAttr{Chroot: root} }
