// SPDX-License-Identifier: Apache-2.0

// Package cli is the command line of kata-checkpoint: cobra's commands, and how
// what they answer is printed.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// Exit statuses.
const (
	exitWarning = 1
	exitError   = 2
)

// columns is how wide a terminal has to be.
const columns = 80

// statusError ends the command with a status when all has been said already.
type statusError int

func (s statusError) Error() string { return fmt.Sprintf("status %d", int(s)) }

// Run runs the command line and returns the exit status.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return run(ctx, Command(), args, stdout, stderr)
}

func run(ctx context.Context, root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := runAsUsed(ctx, root)
	var status statusError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	fmt.Fprintf(stderr, "kata-checkpoint: %s\n", errcode.Text(err))
	return exitError
}

// runAsUsed executes the command line. An error before a command has begun is one
// of the usage.
func runAsUsed(ctx context.Context, root *cobra.Command) error {
	begun := false
	var watch func(c *cobra.Command)
	watch = func(c *cobra.Command) {
		if run := c.RunE; run != nil {
			c.RunE = func(cmd *cobra.Command, args []string) error {
				begun = true
				return run(cmd, args)
			}
		}
		for _, sub := range c.Commands() {
			watch(sub)
		}
	}
	watch(root)
	c, err := root.ExecuteContextC(ctx)
	if err != nil && !begun {
		err = errcode.Usage.Errorf("%w: %s", err, hint(c))
	}
	return err
}

// hint tells how a command is used.
func hint(c *cobra.Command) string {
	if c.HasAvailableSubCommands() {
		if alike := c.SuggestionsFor(c.Flags().Arg(0)); len(alike) > 0 {
			return "did you mean " + strings.Join(alike, " or ") + "?"
		}
		return fmt.Sprintf("see `%s --help` for the commands", c.CommandPath())
	}
	return fmt.Sprintf("use `%s`, see `%s --help`", c.UseLine(), c.CommandPath())
}

// Command is the command line.
func Command() *cobra.Command {
	root := &cobra.Command{
		Use:           "kata-checkpoint",
		Short:         "Checkpoint and restore containers in Kata Containers VMs",
		Version:       version.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          showHelp,
	}
	wrapHelp(root)
	root.AddGroup(&cobra.Group{ID: everydayGroup, Title: "Checkpoints:"}, &cobra.Group{ID: nodeGroup, Title: "The node:"})
	root.AddCommand(createCommand(), restoreCommand(), podCommand(), lsCommand(), inspectCommand(), diffCommand(), verifyCommand(), rmCommand(), keepCommand(), pruneCommand(), exportCommand(), importCommand(), trustCommand())
	for _, c := range []*cobra.Command{checkCommand(), installCommand(), uninstallCommand(), guestKernelCommand(), guestInitrdCommand(), explainCommand()} {
		c.GroupID = nodeGroup
		root.AddCommand(c)
	}
	root.AddCommand(probeCommand(), guardCommand())
	return root
}

// showHelp is what a command does that has only subcommands.
func showHelp(c *cobra.Command, _ []string) error { return c.Help() }

// wrapHelp lets the help fit on a terminal.
func wrapHelp(root *cobra.Command) {
	cobra.AddTemplateFunc("wrapped", func(f *pflag.FlagSet) string { return f.FlagUsagesWrapped(columns) })
	root.SetUsageTemplate(strings.NewReplacer(".FlagUsages", " | wrapped", "for more information about a command.", "tells more about one.").Replace(root.UsageTemplate()))
}

func checkCommand() *cobra.Command {
	var (
		path, address, namespace string
		asJSON, guest            bool
	)
	c := &cobra.Command{
		Use:   "check [CONTAINER]",
		Short: "Look for what stands in the way of a checkpoint",
		Long: `Look for what stands in the way of a checkpoint on this node: containerd, the
runtime, Kata and its configuration, the guest bundle, the guest kernel, the
disk. Nothing is changed. Each finding is a line; a warning or an error is
followed by what cures it.

With --guest a container is started as well, whose agent answers for the guest,
checkpointed, and removed. With CONTAINER, the ID of a running container or the
beginning of it, the check is whether this container can be checkpointed now,
with all reasons if it cannot, and how much would be written; it is not frozen.

The exit status is 0 if all is well, 1 for warnings, 2 for errors.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := config.Load(path)
			if err != nil {
				return err
			}
			host := &check.Host{Config: cfg, Containerd: address}
			var findings check.Findings
			switch {
			case len(args) == 1 && guest:
				return errcode.Usage.Wrap(errors.New("--guest looks at a guest of its own: leave CONTAINER out"))
			case len(args) == 1:
				findings = host.Container(cmd.Context(), namespace, args[0])
			default:
				findings = host.Run(cmd.Context())
				if guest {
					findings = append(findings, host.Guest(cmd.Context())...)
				}
			}
			return showFindings(cmd.OutOrStdout(), findings, asJSON)
		},
	}
	flags := c.Flags()
	flags.StringVar(&path, "config", config.Path(), "kata-checkpoint's configuration, the `file` that the shim reads")
	flags.StringVar(&address, "address", "/run/containerd/containerd.sock", "containerd's `socket`")
	flags.BoolVar(&guest, "guest", false, "also start a container, to look at a guest")
	flags.StringVarP(&namespace, "namespace", "n", "", "containerd's `namespace` of CONTAINER (default: all)")
	flags.BoolVar(&asJSON, "json", false, "print JSON: a list of objects with check, level, text, cure and code")
	return c
}

// probeCommand is what runs in the container of check --guest.
func probeCommand() *cobra.Command {
	return &cobra.Command{
		Use: check.ProbeCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return check.Probe(cmd.Context()) },
	}
}

// showFindings prints findings, and is an error with the exit status of the
// worst.
func showFindings(w io.Writer, findings check.Findings, asJSON bool) error {
	if err := show(w, findings, asJSON); err != nil {
		return err
	}
	switch findings.Worst() {
	case check.Warning:
		return statusError(exitWarning)
	case check.Error:
		return statusError(exitError)
	default:
		return nil
	}
}

// show prints findings, for people or as JSON.
func show(w io.Writer, findings check.Findings, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(findings)
	}
	paint := func(_ check.Level, s string) string { return s }
	if colour(w) {
		paint = func(l check.Level, s string) string {
			return "\x1b[" + [...]string{"32", "33", "31"}[l] + "m" + s + "\x1b[0m"
		}
	}
	for _, f := range findings {
		if _, err := fmt.Fprintf(w, "%s  %s: %s\n", paint(f.Level, fmt.Sprintf("%-7s", f.Level)), f.Check, errcode.With(f.Text, f.Code)); err != nil {
			return err
		}
		if f.Cure != "" {
			if _, err := fmt.Fprintf(w, "         cure: %s\n", f.Cure); err != nil {
				return err
			}
		}
	}
	return nil
}

// colour reports whether w is a terminal whose user wants colours
// (https://no-color.org).
func colour(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	st, err := file.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
