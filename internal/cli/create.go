// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/criuimage"
	"github.com/kata-checkpoint/kata-checkpoint/internal/engine"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// made is what create and pod print of a checkpoint.
type made struct {
	*store.Record
	Bytes    int64    `json:"bytes"`
	Path     string   `json:"path"`
	Warnings []string `json:"warnings,omitempty"`
	dump     time.Duration
}

func madeOf(s *store.Store, c *engine.Checkpoint) (*made, error) {
	stored, err := s.Open(c.Name)
	if err != nil {
		return nil, err
	}
	return &made{Record: c.Record, Bytes: stored.Size, Path: stored.Path, Warnings: c.Warnings, dump: c.Dump}, nil
}

func (m *made) print(p *printer) {
	p.line("%s: %s, the container was frozen for %.1f s and %s", m.Name, progress.Bytes(m.Bytes), m.Frozen.Seconds(), map[bool]string{true: "is stopped", false: "keeps running"}[m.Stopped])
	for _, w := range m.Warnings {
		p.line("warning: %s", w)
	}
}

func createCommand() *cobra.Command {
	e := &everyday{}
	var namespace string
	var leaveRunning, stop, tcp, stats, keep bool
	c := e.base(&cobra.Command{
		Use:   "create CONTAINER NAME",
		Short: "Make a checkpoint of a container",
		Long: `Make a checkpoint of a container of ctr, nerdctl, Docker or the CRI, and store
it by a name. CONTAINER is its name or ID, or the beginning of that; a container
of a pod is also called POD/CONTAINER or NAMESPACE/POD/CONTAINER.

The checkpoint has the container's processes and their memory, /dev/shm, and
the changes of its root file system, all of one instant. What becomes of the
container afterwards config.toml and its annotation kata-checkpoint.dev/after
say, unless --stop or --leave-running is given: by default a container of a pod
keeps running, and any other is stopped.

Interrupted by ctrl-C, nothing is left of the checkpoint, and the container
runs.`,
		Example: `  kata-checkpoint create web before-upgrade
  kata-checkpoint create --leave-running shop/web/app nightly`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, s, err := e.node()
			if err != nil {
				return err
			}
			defer n.Close()
			ctx, cancel := e.context(cmd)
			defer cancel()
			found, err := n.Find(ctx, namespace, args[0])
			if err != nil {
				return err
			}
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			bar := display.Bar(args[1])
			o := engine.Options{Stop: found.Stops(), TCP: tcp}
			if stop || leaveRunning {
				o.Stop = stop
			}
			out, err := found.Checkpoint(ctx, s, args[1], o, bar)
			if err == nil {
				bar.Done()
			}
			display.Close()
			if err != nil {
				return interrupted(ctx, err)
			}
			m, err := madeOf(s, out)
			if err != nil {
				return err
			}
			if keep {
				stored, err := s.Open(args[1])
				if err == nil {
					err = stored.SetKeep(true)
				}
				if err != nil {
					return err
				}
			}
			if stats {
				return printStats(cmd, m)
			}
			return e.print(cmd.OutOrStdout(), m, m.print)
		},
	}, "what was made, with its times in nanoseconds")
	e.engine(c)
	flags := c.Flags()
	flags.StringVarP(&namespace, "namespace", "n", "", "containerd's `namespace` of CONTAINER (default: all)")
	flags.BoolVarP(&leaveRunning, "leave-running", "R", false, "the container keeps running")
	flags.BoolVar(&stop, "stop", false, "the container is stopped")
	flags.BoolVar(&tcp, "tcp", false, "include TCP connections to outside of the container")
	flags.BoolVar(&keep, "keep", false, "prune never removes this checkpoint")
	flags.BoolVar(&stats, "print-stats", false, "print the statistics of podman's --print-stats, with its keys")
	c.MarkFlagsMutuallyExclusive("stop", "leave-running")
	c.MarkFlagsMutuallyExclusive("json", "print-stats")
	return c
}

// printStats prints what `podman container checkpoint --print-stats` prints,
// times in microseconds.
func printStats(cmd *cobra.Command, m *made) error {
	type container struct {
		ID      string           `json:"Id"`
		Runtime int64            `json:"runtime_checkpoint_duration"`
		CRIU    *criuimage.Stats `json:"criu_statistics"`
	}
	data, err := os.ReadFile(m.Path + "/" + imageset.StatsName)
	if err != nil {
		return fmt.Errorf("CRIU's statistics: %w", err)
	}
	stats, err := criuimage.ParseStats(data[:min(len(data), criuimage.MaxStats)])
	if err != nil {
		return err
	}
	return printJSON(cmd.OutOrStdout(), struct {
		Podman     int64       `json:"podman_checkpoint_duration"`
		Containers []container `json:"container_statistics"`
	}{m.Took.Microseconds(), []container{{m.Container, m.dump.Microseconds(), stats}}})
}

func podCommand() *cobra.Command {
	e := &everyday{}
	var tcp bool
	c := e.base(&cobra.Command{
		Use:   "pod POD NAME",
		Short: "Make a checkpoint of all containers of a pod, in one instant",
		Long: `Make a checkpoint of each container of a pod, all of one instant: all are paused
before the first is captured, and resumed after the last. The checkpoints have
the names NAME-CONTAINER; restore, rm and export know all of them as NAME.

POD is the pod's name, NAMESPACE/NAME, or the ID of its sandbox. The containers
keep running, unless their annotation kata-checkpoint.dev/after says otherwise.
If one of them cannot be checkpointed, none is.`,
		Example: `  kata-checkpoint pod shop/web monday
  kata-checkpoint restore monday`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, s, err := e.node()
			if err != nil {
				return err
			}
			defer n.Close()
			ctx, cancel := e.context(cmd)
			defer cancel()
			containers, err := n.Pod(ctx, args[0])
			if err != nil {
				return err
			}
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			var bars []progress.Bar
			out, err := n.CheckpointPod(ctx, s, args[1], containers, engine.Options{TCP: tcp}, func(name string) progress.Bar {
				bar := display.Bar(name)
				bars = append(bars, bar)
				return bar
			})
			if err == nil {
				for _, bar := range bars {
					bar.Done()
				}
			}
			display.Close()
			if err != nil {
				return interrupted(ctx, err)
			}
			var list []*made
			for _, c := range out {
				m, err := madeOf(s, c)
				if err != nil {
					return err
				}
				list = append(list, m)
			}
			return e.print(cmd.OutOrStdout(), list, func(p *printer) {
				for _, m := range list {
					m.print(p)
				}
			})
		},
	}, "a list of what was made")
	e.engine(c)
	c.Flags().BoolVar(&tcp, "tcp", false, "include TCP connections to outside of each container")
	return c
}
