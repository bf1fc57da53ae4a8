package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// orphanWait is how long an agent that was started again waits for a CRIU
// whose agent has died, in all. One that dumps is better left to finish than killed.
const orphanWait = 5 * time.Second

// takeOver deals with what an agent that has died left: a CRIU at work, which
// freezes its container once more when it is done, directories of operations,
// and frozen containers, which are thawed unless a shim claims them.
func (a *Agent) takeOver() error {
	deadline := time.Now().Add(orphanWait)
	for _, pid := range criu.Running() {
		if err := outlive(pid, deadline); err != nil {
			return err
		}
	}
	ops, err := filepath.Glob(filepath.Join(a.dir, "ops", "*"))
	for _, dir := range ops {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		return err
	}
	records, err := os.ReadDir(filepath.Join(a.dir, "containers"))
	if err != nil {
		return err
	}
	for _, r := range records {
		id, ok := strings.CutSuffix(r.Name(), ".json")
		if !ok {
			continue
		}
		c, err := a.running(id)
		if err != nil {
			continue // it has ended
		}
		if frozen, err := cgroup.Frozen(c.tree()); err == nil && frozen {
			log.L.WithField("container", id).Warn("frozen by an agent that has died")
			a.hold.frozen(id)
		}
	}
	return nil
}

// outlive waits for the end of a process, and kills it if that does not come
// in time.
func outlive(pid int, deadline time.Time) error {
	fd, err := pidfd.Open(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	log.L.WithField("pid", pid).Warn("the CRIU of an agent that has died is at work")
	ended, err := pidfd.Wait(fd, time.Until(deadline))
	if err != nil || ended {
		return err
	}
	log.L.WithField("pid", pid).Warn("it does not end and is killed")
	if err := pidfd.Kill(fd); err != nil {
		return err
	}
	if ended, err = pidfd.Wait(fd, orphanWait); err == nil && !ended {
		err = fmt.Errorf("process %d, a CRIU without an agent, does not end", pid)
	}
	return err
}
