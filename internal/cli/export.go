// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io"

	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/export"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
)

// exported is what export prints.
type exported struct {
	Name      string `json:"name"`
	File      string `json:"file"`
	Bytes     int64  `json:"bytes"`
	Encrypted bool   `json:"encrypted"`
}

func exportCommand() *cobra.Command {
	e := &everyday{}
	var compression string
	var recipients []string
	var force bool
	c := e.base(&cobra.Command{
		Use:   "export NAME FILE",
		Short: "Write a checkpoint as an archive",
		Long: `Write a checkpoint as an archive: a tar in the layout of the CRI's checkpoint
archives, which checkpointctl, CRI-O and podman read, and of which a pod can be
restored. FILE "-" is the standard output.

With --recipient the archive is encrypted with age (https://age-encryption.org):
only who has the identity can import it. A recipient is a key such as age1...,
or a file with one on each line. An archive has the container's memory, secrets
included.`,
		Example: `  kata-checkpoint export nightly /backup/nightly.tar.zst
  kata-checkpoint export nightly nightly.tar.zst.age --recipient backup.pub
  kata-checkpoint export --compress none nightly nightly.tar`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, s, err := e.load()
			if err != nil {
				return err
			}
			to, err := parseRecipients(recipients)
			if err != nil {
				return err
			}
			list, done, err := lockAll(s, args[0])
			if err != nil {
				return err
			}
			defer done()
			if len(list) > 1 {
				return errcode.Ambiguous.Errorf("%s is the name of %d checkpoints: export them one by one", args[0], len(list))
			}
			stdout := args[1] == "-"
			if _, err := os.Lstat(args[1]); !stdout && err == nil && !force {
				return errcode.CheckpointExists.Errorf("%s exists: name another file, or give --force", args[1])
			}
			if stdout && progress.IsTerminal(cmd.OutOrStdout()) {
				return errcode.Usage.Wrap(errors.New("an archive is not for a terminal: redirect the output, or name a file"))
			}
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			bar := display.Bar(args[0])
			bar.Phase("export", list[0].Size)
			var written int64
			write := func(w io.Writer) error {
				return export.Write(cmd.Context(), io.MultiWriter(w, counter(&written)), list[0], export.Compression(compression), to, bar.Add)
			}
			if stdout {
				err = write(cmd.OutOrStdout())
			} else {
				err = writeFile(args[1], func(f *os.File) error { return write(f) })
			}
			if err == nil {
				bar.Done()
			}
			display.Close()
			if err != nil || stdout {
				return interrupted(cmd.Context(), err)
			}
			out := &exported{args[0], args[1], written, len(to) > 0}
			return e.print(cmd.OutOrStdout(), out, func(p *printer) {
				p.line("%s: %s, %s%s", out.Name, out.File, progress.Bytes(out.Bytes), map[bool]string{true: ", encrypted"}[out.Encrypted])
			})
		},
	}, "name, file, size and whether it is encrypted")
	e.long(c)
	flags := c.Flags()
	flags.StringVar(&compression, "compress", string(export.Zstd), "`zstd`, gzip or none")
	flags.StringArrayVar(&recipients, "recipient", nil, "encrypt for this age `recipient`, or those in a file; may be repeated")
	flags.BoolVarP(&force, "force", "f", false, "replace FILE")
	return c
}

// counterWriter counts what passes.
type counterWriter struct{ n *int64 }

func counter(n *int64) io.Writer { return counterWriter{n} }

// Write implements [io.Writer].
func (c counterWriter) Write(p []byte) (int, error) {
	*c.n += int64(len(p))
	return len(p), nil
}

// parseRecipients reads age recipients: each one itself, or a file with some.
func parseRecipients(args []string) (out []age.Recipient, err error) {
	for _, arg := range args {
		text := io.Reader(strings.NewReader(arg))
		if !strings.HasPrefix(arg, "age1") {
			f, err := os.Open(arg)
			if err != nil {
				return nil, errcode.AgeKey.Errorf("recipient %s: it is neither a key that begins with age1 nor a file with one: %w", arg, err)
			}
			defer f.Close()
			text = f
		}
		list, err := age.ParseRecipients(text)
		if err != nil {
			return nil, errcode.AgeKey.Errorf("recipient %s: %w", arg, err)
		}
		out = append(out, list...)
	}
	return out, nil
}

func parseIdentities(files []string) (out []age.Identity, err error) {
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return nil, errcode.AgeKey.Errorf("identity: %w", err)
		}
		defer f.Close()
		list, err := age.ParseIdentities(f)
		if err != nil {
			return nil, errcode.AgeKey.Errorf("identity %s: %w", path, err)
		}
		out = append(out, list...)
	}
	return out, nil
}

func importCommand() *cobra.Command {
	e := &everyday{}
	var identities []string
	c := e.base(&cobra.Command{
		Use:   "import FILE [NAME]",
		Short: "Store a checkpoint from an archive",
		Long: `Store a checkpoint from an archive: one of export, crictl or the kubelet, with
any compression. FILE "-" is the standard input. Every file is compared with its
digest before the checkpoint has its name, which is that of FILE unless NAME is
given. Whether a key that this node trusts has signed it verify reports.

With --identity an archive that is encrypted with age is decrypted.`,
		Example: `  kata-checkpoint import /var/lib/kubelet/checkpoints/checkpoint-web.tar web
  kata-checkpoint import nightly.tar.zst.age --identity key.txt`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			cfg, s, err := e.load()
			if err != nil {
				return err
			}
			keys, err := parseIdentities(identities)
			if err != nil {
				return err
			}
			name := strings.NewReplacer(" ", "-", "..", ".").Replace(trimSuffixes(filepath.Base(args[0])))
			if len(args) > 1 {
				name = args[1]
			} else if args[0] == "-" {
				return errcode.Usage.Wrap(errors.New("give the checkpoint a NAME"))
			}
			in, size := cmd.InOrStdin(), int64(0)
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return errcode.NoArchive.Errorf("the archive to import: %w", err)
				}
				defer f.Close()
				if st, err := f.Stat(); err == nil {
					size = st.Size()
				}
				in = f
			}
			draft, err := s.Begin(name)
			if err != nil {
				return err
			}
			defer func() {
				if aerr := draft.Abort(); err == nil {
					err = aerr
				}
			}()
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			bar := display.Bar(name)
			bar.Phase("import", size)
			limits := imageset.Limits{Files: cfg.MaxImageFiles, Bytes: cfg.MaxImageBytes, Reserve: cfg.ReserveBytes}
			record, manifest, err := export.Read(cmd.Context(), budget.Reader(cmd.Context(), in), draft, keys, limits, bar.Add)
			if err == nil {
				record.Imported = args[0]
				bar.Phase("store", 0)
				err = draft.Commit(cmd.Context(), record)
			}
			if err == nil {
				bar.Done()
			}
			display.Close()
			if err != nil {
				if cmd.Context().Err() != nil {
					return interrupted(cmd.Context(), err)
				}
				return fmt.Errorf("import %s: %w", args[0], err)
			}
			stored, err := s.Open(name)
			if err != nil {
				return err
			}
			l := listedOf(stored)
			return e.print(cmd.OutOrStdout(), l, func(p *printer) {
				p.line("%s: %s of %s, made %s", l.Name, progress.Bytes(l.Bytes), l.Of(), manifest.Created.Local().Format("2006-01-02 15:04"))
			})
		},
	}, "the checkpoint, as ls prints it")
	e.long(c)
	c.Flags().StringArrayVar(&identities, "identity", nil, "decrypt with the age identity in this `file`; may be repeated")
	return c
}

// trimSuffixes removes what says how an archive is packed.
func trimSuffixes(name string) string {
	for _, suffix := range []string{".age", ".zst", ".gz", ".tgz", ".tar"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}
