// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// listed is a checkpoint in the output of ls and prune.
type listed struct {
	*store.Record
	Bytes  int64  `json:"bytes"`
	Path   string `json:"path"`
	Keep   bool   `json:"keep"`
	Damage string `json:"damage,omitempty"`
	// Reason is why prune removes it.
	Reason string `json:"reason,omitempty"`
}

func listedOf(c *store.Checkpoint) listed {
	l := listed{Record: c.Record, Bytes: c.Size, Path: c.Path, Keep: c.Keep}
	if c.Damage != nil {
		l.Damage = c.Damage.Error()
	}
	return l
}

func lsCommand() *cobra.Command {
	e := &everyday{}
	return e.base(&cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the checkpoints, the oldest first",
		Long: `List the checkpoints, the oldest first. The last column has "keep" for those
that prune never removes, and "damaged" for those whose record cannot be read.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, s, err := e.load()
			if err != nil {
				return err
			}
			list, err := s.List()
			if err != nil {
				return err
			}
			all := []listed{}
			for _, c := range list {
				all = append(all, listedOf(c))
			}
			return e.print(cmd.OutOrStdout(), all, func(p *printer) {
				table := tabwriter.NewWriter(p.w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(table, "NAME\tCONTAINER\tENGINE\tCREATED\tSIZE\t")
				for _, l := range all {
					created, note := l.Created.Local().Format("2006-01-02 15:04"), ""
					switch {
					case l.Damage != "":
						created, note = "?", "damaged"
					case l.Keep:
						note = "keep"
					}
					of := l.Of()
					if of == l.Container {
						of = of[:min(len(of), 20)]
					}
					fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", l.Name, of, l.Engine, created, progress.Bytes(l.Bytes), note)
				}
				p.err = table.Flush()
			})
		},
	}, "a list of objects, with the record of each")
}

func rmCommand() *cobra.Command {
	e := &everyday{}
	var force bool
	c := e.base(&cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"remove"},
		Short:   "Remove checkpoints",
		Long: `Remove checkpoints. NAME may be that of all checkpoints of a pod. Those that
prune has to keep are removed with --force only.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, s, err := e.load()
			if err != nil {
				return err
			}
			var list []*store.Checkpoint
			for _, name := range args {
				found, err := byName(s, name)
				if err != nil {
					return err
				}
				list = append(list, found...)
			}
			for _, c := range list {
				if c.Keep && !force {
					return errcode.Kept.Errorf("checkpoint %s is to be kept: give --force, or kata-checkpoint keep --undo %[1]s", c.Name)
				}
			}
			removed := []string{}
			for _, c := range list {
				if err := s.Remove(c); err != nil {
					return err
				}
				removed = append(removed, c.Name)
			}
			return e.print(cmd.OutOrStdout(), removed, func(p *printer) {
				for _, name := range removed {
					p.line("%s: removed", name)
				}
			})
		},
	}, "a list of the names")
	c.Flags().BoolVarP(&force, "force", "f", false, "also those that prune has to keep")
	return c
}

func keepCommand() *cobra.Command {
	e := &everyday{}
	var undo bool
	c := e.base(&cobra.Command{
		Use:   "keep NAME...",
		Short: "Have prune keep checkpoints",
		Long: `Have prune keep checkpoints, by an empty file .keep in the directory of each,
and rm refuse them.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, s, err := e.load()
			if err != nil {
				return err
			}
			all := []listed{}
			for _, name := range args {
				list, err := byName(s, name)
				if err != nil {
					return err
				}
				for _, c := range list {
					if err := c.SetKeep(!undo); err != nil {
						return err
					}
					all = append(all, listedOf(c))
				}
			}
			return e.print(cmd.OutOrStdout(), all, func(*printer) {})
		},
	}, "a list of the checkpoints")
	c.Flags().BoolVar(&undo, "undo", false, "do not keep them any longer")
	return c
}

func pruneCommand() *cobra.Command {
	e := &everyday{}
	var policy store.Policy
	var age, size string
	var dryRun bool
	c := e.base(&cobra.Command{
		Use:   "prune",
		Short: "Remove old checkpoints",
		Long: `Remove checkpoints by their number, age and size; at least one of the flags is
needed. Those with a file .keep in their directory stay (kata-checkpoint keep),
and so do those whose record cannot be read.`,
		Example: `  kata-checkpoint prune --keep-last 3 --older-than 30d
  kata-checkpoint prune --max-size 50GiB --dry-run`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			_, s, err := e.load()
			if err != nil {
				return err
			}
			if age != "" {
				if policy.Age, err = days(age); err != nil {
					return err
				}
			}
			if size != "" {
				if policy.Bytes, err = byteSize(size); err != nil {
					return err
				}
			}
			list, err := s.List()
			if err != nil {
				return err
			}
			pruned, err := policy.Prune(list, time.Now())
			if err != nil {
				return err
			}
			all, inUse := []listed{}, error(nil)
			for _, c := range pruned {
				if !dryRun {
					if err := s.Remove(c.Checkpoint); errors.Is(err, store.ErrInUse) {
						inUse = err
						continue
					} else if err != nil {
						return err
					}
				}
				l := listedOf(c.Checkpoint)
				l.Reason = c.Reason
				all = append(all, l)
			}
			if err := e.print(cmd.OutOrStdout(), all, func(p *printer) {
				for _, l := range all {
					p.line("%s: %s, %s: %s", l.Name, progress.Bytes(l.Bytes), map[bool]string{true: "would be removed", false: "removed"}[dryRun], l.Reason)
				}
			}); err != nil {
				return err
			}
			return inUse
		},
	}, "a list of what was removed, each with its reason")
	flags := c.Flags()
	flags.IntVar(&policy.Count, "keep-last", 0, "keep the newest `N` of each container")
	flags.StringVar(&age, "older-than", "", "remove those older than this `time`, such as 36h or 7d")
	flags.StringVar(&size, "max-size", "", "remove the oldest until all have at most this `size`, such as 20GiB")
	flags.BoolVar(&dryRun, "dry-run", false, "print what would be removed, and remove nothing")
	return c
}
