// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// checkCredentials refuses an image set with a process or thread whose image has
// no credentials: CRIU would read them from an image of an older format, or
// crash. What credentials a process has is checked once it is restored (package
// outcome).
func checkCredentials(images string) error {
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
		dead := core.GetTc().GetTaskState() == taskDead && zombies[filepath.Base(path)]
		if core.GetThreadCore().GetCreds() == nil && !dead {
			return errcode.Damaged.Errorf("%s has no credentials, and is not the image of a zombie: use another copy of the checkpoint", filepath.Base(path))
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
