// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/capability"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// checkCredentials refuses an image set with a process whose credentials exceed
// those of the container that it is restored into: an image set may come from
// another container, or from anybody. Each thread has an image of its own with
// its credentials.
func checkCredentials(images string, r *api.Rights) error {
	if r == nil {
		return nil
	}
	allowed := capabilityMask(r.GetCapabilities())
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
			continue // of a zombie
		}
		name := core.GetTc().GetComm()
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
