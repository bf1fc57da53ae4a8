// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/install"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// nodeFlags are those that install and uninstall have in common.
func nodeFlags(c *cobra.Command, o *install.Options) {
	flags := c.Flags()
	flags.StringVar(&o.Root, "root", "/", "the node's file system is below this `directory`")
	flags.StringVar(&o.Proc, "proc", "/proc", "where procfs is mounted, a `directory`")
	_ = flags.MarkHidden("proc") // it exists
	flags.StringVar(&o.Dir, "dir", install.DefaultDir, "`directory` of the guest bundles")
	flags.StringVar(&o.BinDir, "bin-dir", install.DefaultBinDir, "`directory` of the binaries, on containerd's PATH")
	flags.StringVar(&o.Config, "config", config.DefaultPath, "kata-checkpoint's configuration, a `file`")
}

func installCommand() *cobra.Command {
	o := &install.Options{Version: version.Version}
	var dryRun bool
	after := &afterwards{o: o}
	c := &cobra.Command{
		Use:   "install",
		Short: "Install kata-checkpoint on this node",
		Long: `Install kata-checkpoint on this node: the shim, the NRI plugin, the guest
bundle, config.toml, and drop-ins for containerd and for Kata. It is run from
the directory of a release, which it finds beside itself.

Nothing is changed that somebody else has written; what has to be changed there
is printed. Files are replaced as a whole, and a guest bundle stays as long as
a VM uses it: running containers can be checkpointed during and after an
upgrade. Installing twice changes nothing, and an upgrade keeps the flags about
the node with which the last release was installed.

The RuntimeClass for Kubernetes is printed in the end.`,
		Example: `  kata-checkpoint install --dry-run
  kata-checkpoint install --restart-containerd
  kata-checkpoint install --kata-config \
    /opt/kata/share/defaults/kata-containers/configuration-clh.toml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Given = cmd.Flags().Changed
			plan, err := install.Prepare(cmd.Context(), o)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if dryRun {
				if err := plan.Diff(out); err != nil {
					return err
				}
				return report(out, plan, true, true, false)
			}
			if err := plan.Apply(); err != nil {
				return err
			}
			return after.run(cmd.Context(), plan, func() error { return report(out, plan, false, true, after.restart) })
		},
	}
	nodeFlags(c, o)
	after.flags(c)
	flags := c.Flags()
	flags.StringVar(&o.Release, "from", releaseDir(), "`directory` of the release, with bin/ and guest-bundle/")
	flags.StringVar(&o.ContainerdConfig, "containerd-config", install.DefaultContainerdConfig, "containerd's configuration, a `file`")
	flags.StringVar(&o.Path, "containerd-path", install.DefaultPath, "containerd's `PATH`, on which it finds Kata's shim (default: systemd's)")
	flags.Lookup("containerd-path").DefValue = "" // longer than a line
	flags.StringVar(&o.KataShim, "kata-shim", "", "Kata's shim, a `file` (default: looked for on containerd's PATH and below /opt/kata)")
	flags.StringVar(&o.KataConfig, "kata-config", "", "Kata's configuration, a `file` (default: the one that its shim reads)")
	flags.StringVar(&o.Kernel, "kernel", "", "the guest kernel, a `file` (default: that of kata-checkpoint guest-kernel if there is one, or Kata's)")
	flags.StringVar(&o.NRIPlugins, "nri-plugins", install.DefaultNRIPlugins, "`directory` of containerd's NRI plugins, empty for none")
	flags.BoolVar(&dryRun, "dry-run", false, "print what would be done as a diff, and do nothing")
	return c
}

func uninstallCommand() *cobra.Command {
	o := &install.Options{Version: version.Version}
	var dryRun, force, purge bool
	after := &afterwards{o: o}
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove from this node what install has written",
		Long: `Remove from this node what install has written, and nothing else. With
sandboxes running it refuses: nothing could end them without the shim.

The directory of images and keys (state_dir) stays, unless --purge is given.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Afterwards there is no configuration.
			state := ""
			if cfg, err := config.Load(filepath.Join(o.Root, o.Config)); err == nil {
				state = cfg.StateDir
			}
			plan, err := install.PrepareRemoval(o, force)
			if errors.Is(err, install.ErrNotInstalled) && after.wait {
				return after.run(cmd.Context(), nil, func() error { return nil })
			}
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if dryRun {
				if err := plan.Diff(out); err != nil {
					return err
				}
				return report(out, plan, true, false, false)
			}
			if err := plan.Apply(); err != nil {
				return err
			}
			return after.run(cmd.Context(), plan, func() error {
				if err := report(out, plan, false, false, after.restart); err != nil {
					return err
				}
				return removeState(out, filepath.Join(o.Root, state), state != "" && purge)
			})
		},
	}
	nodeFlags(c, o)
	after.flags(c)
	flags := c.Flags()
	flags.BoolVar(&dryRun, "dry-run", false, "print what would be done as a diff, and do nothing")
	flags.BoolVar(&force, "remove-changed", false, "also remove files that were changed since they were installed")
	flags.BoolVar(&purge, "purge", false, "also remove state_dir with this node's signing key")
	return c
}

// afterwards is what follows an installation or its removal.
type afterwards struct {
	o             *install.Options
	restart, wait bool
}

func (a *afterwards) flags(c *cobra.Command) {
	c.Flags().BoolVar(&a.restart, "restart-containerd", false, "have systemd restart containerd if something has changed; containers keep running")
	c.Flags().BoolVar(&a.wait, "wait", false, "do not return until SIGTERM, for a DaemonSet")
}

// run restarts containerd, reports, and waits, as far as that is asked for. A
// node on which something is left to do has been set up: its pod does not fail.
func (a *afterwards) run(ctx context.Context, plan *install.Plan, report func() error) error {
	if a.restart && plan != nil && (!plan.Empty() || a.o.RestartDue()) {
		if err := a.o.Systemctl(ctx, "restart", "containerd"); err != nil {
			return err
		}
	}
	err := report()
	if _, left := err.(statusError); a.wait && (err == nil || left) { //nolint:errorlint // ours
		<-ctx.Done()
		return nil
	}
	return err
}

// removeState removes what the shim has made, or says that it is there.
func removeState(out io.Writer, dir string, purge bool) error {
	if purge {
		return os.RemoveAll(dir)
	}
	if _, err := os.Stat(dir); err != nil {
		return nil //nolint:nilerr // there is none
	}
	_, err := fmt.Fprintf(out, "note: %s has this node's signing key and stays: rm -r %[1]s removes it\n", dir)
	return err
}

// releaseDir is the release that this program belongs to.
func releaseDir() string {
	exe, err := os.Executable()
	if err != nil {
		return "."
	}
	if target, err := filepath.EvalSymlinks(exe); err == nil {
		exe = target
	}
	return filepath.Dir(filepath.Dir(exe))
}

// report prints what was done, or would be, and what is left to do.
func report(out io.Writer, plan *install.Plan, dryRun, installed, restarted bool) error {
	p := &printer{w: out}
	if plan.Empty() {
		p.line("nothing to do")
	} else if !dryRun {
		for _, line := range plan.Summary() {
			p.line("%s", line)
		}
	}
	for _, note := range plan.Notes {
		p.line("note: %s", note)
	}
	for _, todo := range plan.Todo {
		p.line("to do: %s", todo)
	}
	if !plan.Empty() && !dryRun && !restarted {
		p.line("to do: systemctl restart containerd")
	}
	if installed && !dryRun {
		p.line("\nFor Kubernetes:\n\n%s", plan.RuntimeClass)
	}
	if p.err == nil && installed && len(plan.Todo) > 0 {
		return statusError(exitWarning)
	}
	return p.err
}

// printer remembers the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if _, err := fmt.Fprintf(p.w, format+"\n", args...); err != nil && p.err == nil {
		p.err = err
	}
}
