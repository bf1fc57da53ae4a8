// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/engine"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// Groups of commands in the help.
const (
	everydayGroup = "everyday"
	nodeGroup     = "node"
)

// DockerSocket is that of Docker's API.
const dockerSocket = "/run/docker.sock"

// everyday is what the commands for checkpoints have in common.
type everyday struct {
	config, address, docker string
	json                    bool
	progress                string
	timeout                 time.Duration
}

// base adds the flags that all of them have.
func (e *everyday) base(c *cobra.Command, what string) *cobra.Command {
	c.GroupID = everydayGroup
	c.Flags().StringVar(&e.config, "config", config.Path(), "kata-checkpoint's configuration, the `file` that the shim reads")
	c.Flags().BoolVar(&e.json, "json", false, "print JSON: "+what)
	return c
}

// engine adds the flags of those that talk to containerd.
func (e *everyday) engine(c *cobra.Command) {
	c.Flags().StringVar(&e.address, "address", "/run/containerd/containerd.sock", "containerd's `socket`")
	c.Flags().StringVar(&e.docker, "docker", dockerSocket, "Docker's `socket`, if there is one")
	c.Flags().DurationVar(&e.timeout, "timeout", 0, "give up after this `time`, such as 5m (default: config.toml's)")
	e.long(c)
}

// long adds the flags of long work.
func (e *everyday) long(c *cobra.Command) {
	c.Flags().StringVar(&e.progress, "progress", "auto", "on stderr: a bar on a terminal and lines elsewhere (auto), or none")
}

func (e *everyday) load() (*config.Config, *store.Store, error) {
	cfg, err := config.Load(e.config)
	if err != nil {
		return nil, nil, err
	}
	return cfg, store.New(cfg.StateDir), nil
}

// node connects to containerd. The caller closes it.
func (e *everyday) node() (*engine.Node, *store.Store, error) {
	cfg, s, err := e.load()
	if err != nil {
		return nil, nil, err
	}
	n, err := engine.Dial(cfg, e.address, e.docker)
	if err != nil {
		return nil, nil, err
	}
	n.Guard = e.guard
	return n, s, nil
}

// context bounds the command.
func (e *everyday) context(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	if e.timeout <= 0 {
		return context.WithCancel(cmd.Context())
	}
	return context.WithTimeoutCause(cmd.Context(), e.timeout, errcode.CommandTimeout.Errorf("it takes longer than --timeout %s: nothing has changed", e.timeout))
}

// display shows progress.
func (e *everyday) display(cmd *cobra.Command) (*progress.Display, error) {
	switch e.progress {
	case "auto":
		return progress.New(cmd.ErrOrStderr(), progress.Interval), nil
	case "none":
		return progress.New(nil, progress.Interval), nil
	}
	return nil, errcode.Usage.Errorf("--progress %s is unknown: use auto or none", e.progress)
}

// print prints JSON, or what text prints.
func (e *everyday) print(w io.Writer, v any, text func(*printer)) error {
	if e.json {
		return printJSON(w, v)
	}
	p := &printer{w: w}
	text(p)
	return p.err
}

func printJSON(w io.Writer, v any) error {
	j := json.NewEncoder(w)
	j.SetIndent("", "  ")
	return j.Encode(v)
}

// interrupted is what a user reads who has ended a command.
func interrupted(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil || errors.Is(err, engine.ErrChanged) {
		return err
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return errors.New("interrupted: nothing has changed")
}

// days is a duration with units of days, too.
func days(s string) (time.Duration, error) {
	if n, found := strings.CutSuffix(s, "d"); found {
		if v, err := strconv.ParseUint(n, 10, 16); err == nil {
			return time.Duration(v) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, errcode.Usage.Errorf("%q is not an age: write 36h or 7d", s)
	}
	return d, nil
}

// byteSize is a size with a unit.
func byteSize(s string) (int64, error) {
	number, factor := s, int64(1)
	for i, unit := range []string{"K", "M", "G", "T"} {
		for _, suffix := range []string{unit + "iB", unit} {
			if n, found := strings.CutSuffix(s, suffix); found {
				number, factor = n, 1<<(10*(i+1))
			}
		}
	}
	v, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || v <= 0 || v > (1<<62)/factor {
		return 0, errcode.Usage.Errorf("%q is not a size: write 500MiB or 20GiB", s)
	}
	return v * factor, nil
}
