package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
)

// A container that shares its pod's pid namespace is no first process's tree,
// and no pid namespace is in its image set: its processes are restored, with
// the pids that they had, into one that is made for them below the
// placeholder's. Its first process is [FirstMode]'s.

// ownPIDNamespace says whether a process is the first of its pid namespace. If
// not, the namespace is another container's, or was.
func ownPIDNamespace(pid int) (bool, error) {
	pids, err := nsPIDs(pid)
	if err != nil {
		return false, err
	}
	return pids[len(pids)-1] == 1, nil
}

// sharedNamespace says whether the processes of an image set shared a pid
// namespace. CRIU has an image of one only when it was told that it is external.
func sharedNamespace(images string) (bool, error) {
	found, err := filepath.Glob(filepath.Join(images, "pidns-*.img"))
	return len(found) > 0, err
}

// imagePIDs are the pids of the processes and threads in an image set: each has
// an image that is named after it.
func imagePIDs(images string) ([]int, error) {
	found, err := filepath.Glob(filepath.Join(images, "core-*.img"))
	var pids []int
	for _, path := range found {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "core-"), ".img")
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// makeNamespace makes a pid namespace in the placeholder's, with all else as the
// placeholder's, and returns the pid of its first process, which is in the
// placeholder's cgroup: it is no part of what is frozen and checkpointed.
func (a *Agent) makeNamespace(c *container) (int, error) {
	binary, err := placeholderPath(c.Init.PID)
	if err != nil {
		return 0, err
	}
	process, err := json.Marshal(specs.Process{Args: []string{binary, FirstMode}, Env: []string{"HOME=/"}, NoNewPrivileges: true})
	if err != nil {
		return 0, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	entered, err := a.spawner.Enter(enter.Request{Target: c.Init.PID, Cgroup: c.Cgroup, Process: process, First: true})
	if err != nil {
		return 0, fmt.Errorf("make a pid namespace: %w", err)
	}
	defer entered.Close()
	fd := int(null.Fd())
	inside, err := entered.Run([3]int{fd, fd, fd})
	if err != nil {
		return 0, fmt.Errorf("make a pid namespace: %w", err)
	}
	pids, err := cgroup.Procs(c.Cgroup, false)
	if err != nil {
		return 0, fmt.Errorf("look for the pid namespace's first process: %w", err)
	}
	for _, pid := range pids {
		// Its pids are the guest's root one, the placeholder's namespace's, and 1.
		if ns, err := nsPIDs(pid); err == nil && len(ns) > 2 && ns[len(ns)-1] == 1 && ns[len(ns)-2] == inside {
			return pid, nil
		}
	}
	return 0, errors.New("the first process of the new pid namespace has ended")
}
