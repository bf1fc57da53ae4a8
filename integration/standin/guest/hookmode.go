// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hook"
)

// HookMode is the agent's helper mode that runs one guest hook. It is a
// separate process because runc starts hooks before the pivot, and because only
// the agent's reaper may wait for processes.
const HookMode = "guest-hook"

const annotateFlag = "-annotations"

// RunHook is the helper: [-annotations] STATUS PATH, a state on stdin. It
// changes the state to the one of Kata's agent. It never fails: a guest hook's
// failure is only logged.
func RunHook(args []string) {
	start := time.Now()
	err := runHook(args)
	// The agent logs to the console.
	console, cerr := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if cerr != nil {
		return
	}
	defer console.Close()
	log.L.Logger.SetOutput(console)
	entry := log.L.WithField("hook", args).WithField("took", time.Since(start))
	if err != nil {
		entry.WithError(err).Error("guest hook failed")
		return
	}
	entry.Info("guest hook done")
}

func runHook(args []string) error {
	annotate := len(args) > 0 && args[0] == annotateFlag
	if annotate {
		args = args[1:]
	}
	if len(args) != 2 {
		return fmt.Errorf("hook: %d arguments", len(args))
	}
	var state specs.State
	if err := json.NewDecoder(os.Stdin).Decode(&state); err != nil {
		return fmt.Errorf("hook: read the state: %w", err)
	}
	state.Status = specs.ContainerState(args[0])
	if !annotate {
		state.Annotations = nil
	}
	return hook.Run(context.Background(), specs.Hook{Path: args[1]}, state, hook.Limit)
}
