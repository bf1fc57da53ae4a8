// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// trusted are the keys that this node trusts: its own, if it has one, and those
// of others.
func trusted(cfg *config.Config) (keys []ed25519.PublicKey, own ed25519.PublicKey, err error) {
	if _, err := os.Stat(cfg.SigningKey); !errors.Is(err, fs.ErrNotExist) {
		key, err := signing.Load(cfg.SigningKey)
		if err != nil {
			return nil, nil, err
		}
		own = key.Public()
		keys = append(keys, own)
	}
	return append(keys, cfg.TrustedKeys...), own, nil
}

func verifyCommand() *cobra.Command {
	e := &everyday{}
	var all bool
	c := e.base(&cobra.Command{
		Use:   "verify [NAME...]",
		Short: "Look for damage in checkpoints, and who has signed them",
		Long: `Read checkpoints and compare every file with its digest, and the manifest with
its signature. What is found is a line for each, as with check. The exit status
is 0 if all is well, 1 if a checkpoint is not signed by a key that this node
trusts, and 2 if one is damaged.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, s, err := e.load()
			if err != nil {
				return err
			}
			var list []*store.Checkpoint
			switch {
			case all == (len(args) > 0):
				return errcode.Usage.Wrap(errors.New("name checkpoints, or give --all"))
			case all:
				if list, err = s.List(); err != nil {
					return err
				}
			}
			for _, name := range args {
				found, err := byName(s, name)
				if err != nil {
					return err
				}
				list = append(list, found...)
			}
			keys, _, err := trusted(cfg)
			if err != nil {
				return err
			}
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			findings := check.Findings{}
			for _, c := range list {
				bar := display.Bar(c.Name)
				found, err := verify(cmd.Context(), c, keys, bar)
				if err != nil {
					display.Close()
					return err
				}
				bar.Done()
				findings = append(findings, found...)
			}
			display.Close()
			return showFindings(cmd.OutOrStdout(), findings, e.json)
		},
	}, "a list of objects with check, level, text and cure")
	e.long(c)
	c.Flags().BoolVar(&all, "all", false, "all checkpoints")
	return c
}

// verify reads a checkpoint. Its error is that it could not.
func verify(ctx context.Context, c *store.Checkpoint, keys []ed25519.PublicKey, bar progress.Bar) (out check.Findings, _ error) {
	l, err := c.Lock()
	if err != nil {
		return nil, err
	}
	defer l.Close()
	const cure = "restore from another checkpoint, and remove this one: kata-checkpoint rm --force "
	damaged := func(err error) (check.Findings, error) {
		if ctx.Err() != nil {
			return nil, errors.New("interrupted: not all was read")
		}
		return append(out, check.Finding{Check: c.Name, Level: check.Error, Text: err.Error(), Code: errcode.Reason(err), Cure: cure + c.Name}), nil
	}
	bar.Phase("verify", c.Size)
	set, err := imageset.Open(c.Images())
	if err != nil {
		return damaged(err)
	}
	defer set.Close()
	if err := set.CheckFiles(ctx, bar.Add); err != nil {
		return damaged(err)
	}
	if err := c.Check(ctx, bar.Add); err != nil {
		return damaged(err)
	}
	out = append(out, check.Finding{Check: c.Name, Text: fmt.Sprintf("%d files, %s: all as they were written", len(set.Manifest.Files)+len(c.Files), progress.Bytes(c.Size))})
	switch err := set.Verify(keys); {
	case err == nil:
		out = append(out, check.Finding{Check: c.Name, Text: "signed by " + set.Manifest.SignedBy + ", which this node trusts"})
	case errors.Is(err, imageset.ErrForged):
		return damaged(err)
	case errors.Is(err, imageset.ErrUntrusted):
		out = append(out, check.Finding{Check: c.Name, Level: check.Warning, Text: err.Error(), Code: errcode.Reason(err), Cure: "if you trust who made it, kata-checkpoint trust add with the public key of that node (kata-checkpoint trust show, there)"})
	default:
		out = append(out, check.Finding{Check: c.Name, Level: check.Warning, Text: err.Error(), Code: errcode.Reason(err), Cure: "make it on a node that signs its checkpoints"})
	}
	return out, nil
}

// trustOf is the result of a signature's verification in a word.
func trustOf(err error) string {
	switch {
	case err == nil:
		return "trusted"
	case errors.Is(err, imageset.ErrForged):
		return "forged"
	case errors.Is(err, imageset.ErrUntrusted):
		return "untrusted"
	}
	return "unsigned"
}
