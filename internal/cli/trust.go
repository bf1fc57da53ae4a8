// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

// trustedKey is a key in the output of trust.
type trustedKey struct {
	Fingerprint string `json:"fingerprint"`
	// Source is where it is: a file, or config.toml.
	Source string `json:"source"`
	// Own: it is this node's.
	Own bool `json:"own"`
}

func trustCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "trust",
		Short: "Manage the keys whose checkpoints this node restores",
		Long: `Manage the public keys of the nodes whose signed checkpoints this node restores
in pods, beside its own: those in trusted_keys of config.toml, and in the
directory trusted-keys of state_dir, which add and remove change. Containers
that are created from then on use them.`,
		GroupID: everydayGroup,
		Args:    cobra.NoArgs,
		RunE:    showHelp,
	}
	c.AddCommand(trustListCommand(), trustAddCommand(), trustRemoveCommand(), trustShowCommand())
	return c
}

// trustBase is everyday.base for a subcommand.
func (e *everyday) trustBase(c *cobra.Command, what string) *cobra.Command {
	e.base(c, what)
	c.GroupID = ""
	return c
}

func trustedKeys(cfg *config.Config) ([]trustedKey, error) {
	_, own, err := trusted(cfg)
	if err != nil {
		return nil, err
	}
	out := []trustedKey{}
	if own != nil {
		out = append(out, trustedKey{signing.Fingerprint(own), cfg.SigningKey + signing.PublicSuffix, true})
	}
	files, err := signing.ReadDir(cfg.TrustedKeysDir())
	if err != nil {
		return nil, err
	}
	for _, k := range cfg.TrustedKeys[:len(cfg.TrustedKeys)-len(files)] {
		out = append(out, trustedKey{signing.Fingerprint(k), "trusted_keys in config.toml", false})
	}
	for _, k := range files {
		out = append(out, trustedKey{signing.Fingerprint(k.Key), k.File, false})
	}
	return out, nil
}

func trustListCommand() *cobra.Command {
	e := &everyday{}
	return e.trustBase(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the trusted keys, this node's own included", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(e.config)
			if err != nil {
				return err
			}
			list, err := trustedKeys(cfg)
			if err != nil {
				return err
			}
			return e.print(cmd.OutOrStdout(), list, func(p *printer) {
				for _, k := range list {
					p.line("%s  %s%s", k.Fingerprint, k.Source, map[bool]string{true: " (this node)"}[k.Own])
				}
			})
		},
	}, "a list of objects with fingerprint, source and own")
}

func trustAddCommand() *cobra.Command {
	e := &everyday{}
	return e.trustBase(&cobra.Command{
		Use:   "add FILE",
		Short: "Trust the public keys in a file",
		Long: `Trust the public keys in a file: Ed25519 keys in PEM, as trust show prints that
of a node. FILE "-" is the standard input. Compare the fingerprint that is
printed with that of the node: who has the private key can make checkpoints that
become processes in pods of this node.`,
		Example: `  ssh node2 kata-checkpoint trust show | kata-checkpoint trust add -`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := config.Load(e.config)
			if err != nil {
				return err
			}
			in := cmd.InOrStdin()
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return errcode.TrustedKey.Errorf("the keys to trust: %w", err)
				}
				defer f.Close()
				in = f
			}
			data, err := io.ReadAll(io.LimitReader(in, 1<<20))
			if err != nil {
				return err
			}
			keys, err := signing.ParsePublic(string(data))
			if err != nil {
				return errcode.TrustedKey.Errorf("%s has %w: give a file with Ed25519 public keys in PEM", args[0], err)
			}
			added := []trustedKey{}
			for _, k := range keys {
				path, err := signing.AddToDir(cfg.TrustedKeysDir(), k)
				if err != nil {
					return err
				}
				added = append(added, trustedKey{Fingerprint: signing.Fingerprint(k), Source: path})
			}
			return e.print(cmd.OutOrStdout(), added, func(p *printer) {
				for _, k := range added {
					p.line("%s: trusted", k.Fingerprint)
				}
			})
		},
	}, "a list of the keys")
}

func trustRemoveCommand() *cobra.Command {
	e := &everyday{}
	return e.trustBase(&cobra.Command{
		Use: "remove FINGERPRINT", Aliases: []string{"rm"}, Short: "Trust a key no longer",
		Long: `Trust a key no longer. FINGERPRINT is what trust list prints, or the beginning
of it. This node's own key and those in config.toml are not changed.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := config.Load(e.config)
			if err != nil {
				return err
			}
			files, err := signing.ReadDir(cfg.TrustedKeysDir())
			if err != nil {
				return err
			}
			want := "SHA256:" + strings.TrimPrefix(args[0], "SHA256:")
			var found []signing.Trusted
			for _, k := range files {
				if strings.HasPrefix(signing.Fingerprint(k.Key), want) {
					found = append(found, k)
				}
			}
			switch {
			case len(found) == 0:
				return errcode.TrustedKey.Errorf("no key in %s has a fingerprint that begins with %s: kata-checkpoint trust list has the keys, and those of config.toml are removed there", cfg.TrustedKeysDir(), want)
			case len(found) > 1:
				return errcode.TrustedKey.Errorf("%d keys have fingerprints that begin with %s: give more of it", len(found), want)
			}
			for _, k := range files {
				if k.File == found[0].File && !k.Key.Equal(found[0].Key) {
					return errcode.TrustedKey.Errorf("%s has other keys, too: remove it by hand", found[0].File)
				}
			}
			if err := os.Remove(found[0].File); err != nil {
				return err
			}
			removed := trustedKey{Fingerprint: signing.Fingerprint(found[0].Key), Source: found[0].File}
			return e.print(cmd.OutOrStdout(), removed, func(p *printer) { p.line("%s: not trusted any longer", removed.Fingerprint) })
		},
	}, "the key")
}

func trustShowCommand() *cobra.Command {
	e := &everyday{}
	return e.trustBase(&cobra.Command{
		Use: "show", Short: "Print this node's public key", Args: cobra.NoArgs,
		Long: "Print this node's public key as PEM, for trust add on other nodes. The key is\nmade if there is none yet.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(e.config)
			if err != nil {
				return err
			}
			key, err := signing.Load(cfg.SigningKey)
			if err != nil {
				return err
			}
			text, err := signing.MarshalPublic(key.Public())
			if err != nil {
				return err
			}
			out := struct {
				Fingerprint string `json:"fingerprint"`
				PEM         string `json:"pem"`
			}{signing.Fingerprint(key.Public()), string(text)}
			return e.print(cmd.OutOrStdout(), out, func(p *printer) { p.line("%s", strings.TrimSpace(out.PEM)) })
		},
	}, "fingerprint and pem")
}
