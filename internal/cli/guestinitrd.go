// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/install"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

func guestInitrdCommand() *cobra.Command {
	o := &guestinitrd.Options{Version: version.Version}
	var asJSON bool
	c := &cobra.Command{
		Use:   "guest-initrd",
		Short: "Append the agent to an initrd of Kata's",
		Long: `Append the guest bundle to an initrd of Kata's, for guests that boot one: the
agent is in the guest then, and nothing is shared with it for that. Kata's own
file stays as it is. The lines for Kata's configuration are printed.

Run it again after an upgrade of Kata or of kata-checkpoint: an initrd that has
a bundle gets the new one in place of it.`,
		Example: `  kata-checkpoint guest-initrd
  kata-checkpoint guest-initrd --initrd ~/kata.img --out ~/with-agent.img`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Base == "" {
				var err error
				if o.Base, err = findInitrd(); err != nil {
					return err
				}
			}
			var err error
			if o.Out, err = filepath.Abs(o.Out); err != nil {
				return err
			}
			r, err := guestinitrd.Append(o)
			if err != nil {
				return err
			}
			st, err := os.Stat(o.Out)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), madeInitrd{o.Out, o.Base, r.Version, st.Size(), st.Size() - r.Base, guestinitrd.HookPath})
			}
			p := &printer{w: cmd.OutOrStdout()}
			p.line("%s is %s with the agent %s", o.Out, o.Base, r.Version)
			p.line("%.1f MiB, of which %.1f MiB are new", mebibytes(st.Size()), mebibytes(st.Size()-r.Base))
			p.line("")
			p.line("In a drop-in of Kata's configuration, whose name sorts behind the others, with")
			p.line("the hypervisor's name for NAME:")
			p.line("")
			p.line("[hypervisor.NAME]")
			p.line("image = \"\"")
			p.line("initrd = %q", o.Out)
			p.line("guest_hook_path = %q", guestinitrd.HookPath)
			return p.err
		},
	}
	flags := c.Flags()
	flags.StringVar(&o.Base, "initrd", "", "Kata's initrd, a `file` (default: kata-containers-initrd.img below Kata's share/kata-containers)")
	flags.StringVar(&o.Bundle, "bundle", filepath.Join(install.DefaultDir, "guest"), "`directory` of the guest bundle")
	flags.StringVar(&o.Out, "out", filepath.Join(install.DefaultDir, "share", guestinitrd.Name), "`file` to write")
	flags.BoolVar(&asJSON, "json", false, "print JSON: an object with initrd, of, version, bytes, added and guest_hook_path")
	return c
}

// madeInitrd is what guest-initrd answers.
type madeInitrd struct {
	Initrd  string `json:"initrd"`
	Of      string `json:"of"`
	Version string `json:"version"`
	// Bytes is its size, and Added how much of it is new.
	Bytes         int64  `json:"bytes"`
	Added         int64  `json:"added"`
	GuestHookPath string `json:"guest_hook_path"`
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// kataShares are where Kata's installers put what its guests boot.
var kataShares = []string{"/opt/kata/share/kata-containers", "/usr/share/kata-containers", "/usr/local/share/kata-containers"}

// findInitrd looks for the initrd that Kata has installed.
func findInitrd() (string, error) {
	for _, dir := range kataShares {
		path := filepath.Join(dir, "kata-containers-initrd.img")
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", errcode.InitrdBase.Wrap(errors.New("the initrd of Kata is not on this machine: name it with --initrd (share/kata-containers/kata-containers-initrd.img of a Kata release)"))
}
