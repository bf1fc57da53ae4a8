// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupPath returns a container's cgroup from its path on the host. Systemd's
// notation is read as the cgroupfs driver does, because an agent that is PID 1
// has no systemd.
func cgroupPath(fromHost, cid string) string {
	if fromHost == "" {
		return "/" + cid
	}
	return filepath.Join("/", strings.ReplaceAll(fromHost, ":", "/"))
}

// cgroup is a container's cgroup.
type cgroup string

func (c cgroup) file(name string) string { return filepath.Join(cgroupRoot, string(c), name) }

// freeze freezes the cgroup and its descendants, and waits until they are
// frozen.
func (c cgroup) freeze() error {
	if err := os.WriteFile(c.file("cgroup.freeze"), []byte("1"), 0); err != nil {
		return fmt.Errorf("freeze cgroup %s: %w", c, err)
	}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); <-time.After(time.Millisecond) {
		if c.keyed("cgroup.events")["frozen"] == 1 {
			return nil
		}
	}
	return fmt.Errorf("freeze cgroup %s: timed out", c)
}

func (c cgroup) thaw() error {
	if err := os.WriteFile(c.file("cgroup.freeze"), []byte("0"), 0); err != nil {
		return fmt.Errorf("thaw cgroup %s: %w", c, err)
	}
	return nil
}

// kill signals the processes of this cgroup, but not those of its descendants.
func (c cgroup) kill(signal unix.Signal) error {
	if err := c.freeze(); err != nil {
		log.L.WithError(err).Warn("failed to freeze cgroup before signalling it")
	}
	pids, err := c.pids()
	for _, pid := range pids {
		if err := unix.Kill(pid, signal); err != nil {
			log.L.WithError(err).WithField("pid", pid).Warn("failed to signal process")
		}
	}
	if thaw := c.thaw(); thaw != nil {
		log.L.WithError(thaw).Warn("failed to thaw cgroup")
	}
	return err
}

func (c cgroup) pids() ([]int, error) {
	raw, err := os.ReadFile(c.file("cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("list the processes of cgroup %s: %w", c, err)
	}
	var pids []int
	for line := range strings.FieldsSeq(string(raw)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// remove removes the cgroup and its descendants, whose processes may still be
// exiting.
func (c cgroup) remove() error {
	deadline := time.Now().Add(3 * time.Second)
	for {
		err := removeBelow(filepath.Join(cgroupRoot, string(c)))
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(5 * time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
}

func removeBelow(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeBelow(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// keyed reads a flat keyed file; unreadable values are 0.
func (c cgroup) keyed(name string) map[string]uint64 {
	values := map[string]uint64{}
	f, err := os.Open(c.file(name))
	if err != nil {
		return values
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), " "); ok {
			values[key], _ = strconv.ParseUint(value, 10, 64)
		}
	}
	return values
}

// single reads a file with one number; "max" and unreadable values are the
// largest number, which engines take for no limit.
func (c cgroup) single(name string) uint64 {
	raw, err := os.ReadFile(c.file(name))
	if err != nil {
		return 0
	}
	text := strings.TrimSpace(string(raw))
	if text == "max" {
		return ^uint64(0)
	}
	value, _ := strconv.ParseUint(text, 10, 64)
	return value
}

// stats returns a container's metrics for the engine.
func (c cgroup) stats() *stats.Metrics {
	cpu, memory, events := c.keyed("cpu.stat"), c.keyed("memory.stat"), c.keyed("memory.events")
	return &stats.Metrics{
		Pids: &stats.PidsStat{Current: c.single("pids.current"), Limit: c.single("pids.max")},
		CPU: &stats.CPUStat{
			UsageUsec: cpu["usage_usec"], UserUsec: cpu["user_usec"], SystemUsec: cpu["system_usec"],
			NrPeriods: cpu["nr_periods"], NrThrottled: cpu["nr_throttled"], ThrottledUsec: cpu["throttled_usec"],
		},
		Memory: &stats.MemoryStat{
			Anon: memory["anon"], File: memory["file"], KernelStack: memory["kernel_stack"], Slab: memory["slab"], Sock: memory["sock"],
			Shmem: memory["shmem"], FileMapped: memory["file_mapped"], FileDirty: memory["file_dirty"],
			InactiveAnon: memory["inactive_anon"], ActiveAnon: memory["active_anon"],
			InactiveFile: memory["inactive_file"], ActiveFile: memory["active_file"], Unevictable: memory["unevictable"],
			Pgfault: memory["pgfault"], Pgmajfault: memory["pgmajfault"],
			Usage: c.single("memory.current"), UsageLimit: c.single("memory.max"),
			SwapUsage: c.single("memory.swap.current"), SwapLimit: c.single("memory.swap.max"),
		},
		MemoryEvents: &stats.MemoryEvents{Low: events["low"], High: events["high"], Max: events["max"], Oom: events["oom"], OomKill: events["oom_kill"]},
	}
}
