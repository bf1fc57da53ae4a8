// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/guestkernel"
	"github.com/kata-checkpoint/kata-checkpoint/internal/install"
)

func guestKernelCommand() *cobra.Command {
	o := &guestkernel.Options{}
	var verbose bool
	c := &cobra.Command{
		Use:   "guest-kernel",
		Short: "Build a guest kernel with the options that CRIU needs",
		Long: `Build a guest kernel with the options that CRIU needs, from Debian's kernel
sources (the package linux-source-6.12 or a later one) and the configuration of
Kata's own kernel. Each option is checked in the configuration that results.

It needs gcc, make, flex, bison, bc and libelf-dev, 3 GiB of disk, and a quarter
of an hour on two cores. The kernel, a compressed one for QEMU, and their
configuration are put where install finds them: run install afterwards.`,
		Example: `  apt-get install linux-source-6.12 gcc make flex bison bc libelf-dev xz-utils
  kata-checkpoint guest-kernel && kata-checkpoint install
  kata-checkpoint guest-kernel --kata-src ~/kata-containers --out .`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Output = io.Discard
			if verbose {
				o.Output = cmd.ErrOrStderr()
			}
			progress := &printer{w: cmd.ErrOrStderr()}
			o.Step = progress.line
			kernel, err := guestkernel.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			p := &printer{w: cmd.OutOrStdout()}
			if n := len(kernel.Dropped); n > 0 {
				p.line("note: %d options of Kata's configuration do not exist in these sources: %s", n, strings.Join(kernel.Dropped, ", "))
			}
			p.line("%s", describeKernel(kernel))
			return p.err
		},
	}
	flags := c.Flags()
	flags.StringVar(&o.Source, "source", "", "kernel sources, a `directory or .tar.xz` (default: the newest /usr/src/linux-source-*.tar.xz)")
	flags.StringVar(&o.KataConfig, "kata-config", "", "configuration of Kata's kernel, a `file` (default: config-* below Kata's share/kata-containers)")
	flags.StringVar(&o.KataSource, "kata-src", "", "take the configuration from Kata's sources in this `directory`")
	flags.StringVar(&o.Out, "out", filepath.Join(install.DefaultDir, filepath.Dir(install.KernelName)), "`directory` for the kernel")
	flags.StringVar(&o.Work, "work", "", "`directory` to build in, which is kept (default: a temporary one below /var/tmp)")
	flags.IntVarP(&o.Jobs, "jobs", "j", runtime.NumCPU(), "compilers to run at a time")
	flags.BoolVar(&o.ConfigOnly, "config-only", false, "only make the configuration, and check it")
	flags.BoolVarP(&verbose, "verbose", "v", false, "show what make prints")
	c.MarkFlagsMutuallyExclusive("kata-config", "kata-src")
	return c
}

func describeKernel(k *guestkernel.Kernel) string {
	if k.Release == "" {
		return fmt.Sprintf("%s has all options", k.Path)
	}
	return fmt.Sprintf("%s is Linux %s with all options", k.Path, k.Release)
}
