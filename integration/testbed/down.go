// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Down kills everything that runs in the testbed and removes it. It can be
// called again after a failure.
func (t *Testbed) Down(ctx context.Context) error {
	start := time.Now()
	// First list, then kill, then remove: what names the rest is removed last.
	sandboxes := t.sandboxes()
	processes, err := t.owned()
	if err != nil {
		return err
	}
	sockets := listening(processes)

	// containerd first, with SIGTERM, so that it can write its database. After
	// that nobody restarts shims.
	t.Containerd.signal(syscall.SIGTERM)
	waitGone(ctx, hang, t.Containerd)
	if err := t.endAll(ctx); err != nil {
		return err
	}

	var errs []error
	for socket := range sockets {
		errs = append(errs, removeSocket(socket))
	}
	for _, id := range sandboxes {
		for _, dir := range sandboxDirs(id) {
			errs = append(errs, removeTree(dir))
		}
		errs = append(errs, removeCgroups(ctx, id), removeFIFOs(id))
	}
	errs = append(errs, t.removeShimSockets(), t.removeNetworkNamespaces(), t.removeCRI())
	if t.SocketDir != "" {
		errs = append(errs, removeTree(t.SocketDir))
	}
	errs = append(errs, leaveMachine(t.Dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("testbed down: %w", err)
	}
	if err := removeTree(t.Dir); err != nil {
		return fmt.Errorf("testbed down: %w", err)
	}
	log.G(ctx).WithFields(log.Fields{"dir": t.Dir, "took": time.Since(start)}).Info("testbed is down")
	return nil
}

// sandboxes lists the ids of all present and past sandboxes and containers:
// containerd has a directory for each present one, the VMM a log for each past
// one.
func (t *Testbed) sandboxes() []string {
	seen := map[string]bool{}
	bundles, _ := filepath.Glob(filepath.Join(t.Dir, "run/io.containerd.runtime.v2.task/*/*"))
	for _, b := range bundles {
		seen[filepath.Base(b)] = true
	}
	logs, _ := filepath.Glob(filepath.Join(t.logDir(), "*.vmm"))
	for _, l := range logs {
		seen[strings.TrimSuffix(filepath.Base(l), ".vmm")] = true
	}
	var out []string
	for id := range seen {
		out = append(out, id)
	}
	return out
}

// sandboxDirs are the directories of Kata's shims for a sandbox outside of its
// bundle, and that of the C virtiofsd's pid file.
func sandboxDirs(id string) []string {
	out := []string{"/run/virtiofsd/.run.kata." + id + ".root.virtiofsd.sock.pid"}
	for _, parent := range []string{
		"/run/kata-containers/shared/sandboxes", "/run/kata-containers", "/run/vc/vm", "/run/vc/sbs", "/run/vc/firecracker", "/run/kata",
	} {
		out = append(out, filepath.Join(parent, id))
	}
	return out
}

// removeCgroups removes the cgroups that Kata leaves behind: NAME/kata_ID and
// kata_overhead/ID. A killed process is in its cgroup until its parent, by now
// PID 1, has reaped it.
func removeCgroups(ctx context.Context, id string) error {
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == id && filepath.Base(filepath.Dir(path)) == "kata_overhead" || d.Name() == "kata_"+id) {
			found = append(found, path)
		}
		return nil // a cgroup that disappears meanwhile is not the testbed's
	})
	for _, path := range found {
		var e error
		if eventually(ctx, hang, func() bool {
			e = unix.Rmdir(path)
			return !errors.Is(e, unix.EBUSY)
		}); e != nil && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove cgroup %s: %w", path, e))
		}
	}
	return err
}

// removeFIFOs removes the directories that clients create for a container's
// stdio.
func removeFIFOs(id string) error {
	found, _ := filepath.Glob("/run/containerd/fifo/*/" + id + "-std*")
	var errs []error
	for _, path := range found {
		errs = append(errs, os.RemoveAll(filepath.Dir(path)))
	}
	return errors.Join(errs...)
}

// removeShimSockets removes shim sockets without a listener. Kata's Go shim
// leaves its own behind, and their names are digests, so that the owner is
// unknown; sockets older than the testbed are left alone.
func (t *Testbed) removeShimSockets() error {
	record, err := os.Stat(filepath.Join(t.Dir, recordName))
	if err != nil {
		return fmt.Errorf("remove sockets: %w", err)
	}
	// The files first: another testbed's shim may create its socket meanwhile.
	found, _ := filepath.Glob("/run/containerd/s/*")
	inUse := map[string]bool{}
	for _, s := range unixSockets() {
		inUse[s.path] = true
	}
	var errs []error
	for _, path := range found {
		info, err := os.Lstat(path)
		if err != nil || inUse[path] || info.ModTime().Before(record.ModTime()) {
			continue
		}
		errs = append(errs, removeSocket(path))
	}
	return errors.Join(errs...)
}
