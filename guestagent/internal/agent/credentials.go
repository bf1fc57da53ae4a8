// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// checkCredentials refuses an image set with a process whose credentials exceed
// those of the container that it is restored into: an image set may come from
// another container, or from anybody. Each thread has an image of its own with
// its credentials. Bounding is the placeholder's bounding set, which nothing may
// exceed.
func checkCredentials(images string, r *api.Rights, bounding uint64) error {
	allowed := bounding
	if r != nil { // an older shim's request may lack them
		allowed &= capabilityMask(r.GetCapabilities())
	}
	zombies, err := readZombies(images)
	if err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(images, "core-*.img"))
	if err != nil {
		return err
	}
	for _, path := range found {
		core, err := readCore(path)
		if err != nil {
			return err
		}
		creds := core.GetThreadCore().GetCreds()
		if creds == nil {
			if core.GetTc().GetTaskState() == taskDead && zombies[filepath.Base(path)] {
				continue
			}
			// CRIU would read them from an image of an older format, or fail.
			return fmt.Errorf("%s has no credentials, and is not the image of a zombie: use another copy of the checkpoint", filepath.Base(path))
		}
		name := text.Line(core.GetTc().GetComm(), text.MaxName)
		if name == "" {
			name = strings.TrimSuffix(filepath.Base(path), ".img")
		}
		var have uint64
		for _, set := range [][]uint32{creds.GetCapInh(), creds.GetCapPrm(), creds.GetCapEff(), creds.GetCapBnd()} {
			for i, part := range set[:min(len(set), 2)] {
				have |= uint64(part) << (32 * i)
			}
		}
		if more := have &^ allowed; more != 0 {
			return fmt.Errorf("the process %s has %s, which this container lacks: give the container the capabilities of the one that was checkpointed",
				name, strings.Join(capabilityNames(more), ", "))
		}
		uids := []uint32{creds.GetUid(), creds.GetEuid(), creds.GetSuid(), creds.GetFsuid()}
		if r.GetNoNewPrivs() && r.GetUid() != 0 && slices.ContainsFunc(uids, func(id uint32) bool { return id != r.GetUid() }) {
			return fmt.Errorf("the process %s runs as another user (%d) than this container (%d), which allows no new privileges: run it as the user of the one that was checkpointed",
				name, creds.GetEuid(), r.GetUid())
		}
	}
	return nil
}

// taskDead is the state of a zombie (compel/include/uapi/task-state.h).
const taskDead = 2

// readZombies returns the names of the images that may be those of zombies:
// those of processes with a single thread.
func readZombies(images string) (map[string]bool, error) {
	tree, err := readTree(images)
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool, len(tree))
	for _, p := range tree {
		if len(p.GetThreads()) <= 1 {
			out[fmt.Sprintf("core-%d.img", p.GetPid())] = true
		}
	}
	return out, nil
}

// boundingSet reads the capability bounding set of a process.
func boundingSet(pid int) (uint64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if set, found := strings.CutPrefix(line, "CapBnd:"); found {
			return strconv.ParseUint(strings.TrimSpace(set), 16, 64)
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no CapBnd", pid)
}

func capabilityMask(names []string) (mask uint64) {
	for _, c := range capability.ListKnown() {
		if slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, "CAP_"+c.String()) }) {
			mask |= 1 << c
		}
	}
	return mask
}

func capabilityNames(mask uint64) (names []string) {
	for _, c := range capability.ListKnown() {
		if mask&(1<<c) != 0 {
			names = append(names, "CAP_"+strings.ToUpper(c.String()))
			mask &^= 1 << c
		}
	}
	if mask != 0 {
		names = append(names, fmt.Sprintf("capabilities %#x", mask))
	}
	return names
}
