// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/archive"
	"github.com/kata-checkpoint/kata-checkpoint/internal/criuimage"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// difference is one between two checkpoints. A side is empty where it lacks it.
type difference struct {
	What   string `json:"what"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

func diffCommand() *cobra.Command {
	e := &everyday{}
	return e.base(&cobra.Command{
		Use:   "diff A B",
		Short: "Show how two checkpoints differ",
		Long: `Show how two checkpoints differ: the container and its options, the processes,
mounts, open files and connections, sizes, and the files that they have in their
root file systems. A line begins with "-" for what only A has, "+" for what only
B has, and "~" for what has changed.

The exit status is 0 if they are alike, and 1 if they differ.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, s, err := e.load()
			if err != nil {
				return err
			}
			var sides [2]map[string]string
			for i, name := range args {
				c, err := s.Open(name)
				if err != nil {
					return err
				}
				if sides[i], err = facts(cmd.Context(), c); err != nil {
					return fmt.Errorf("checkpoint %s: %w", name, err)
				}
			}
			list := compare(sides[0], sides[1])
			if err := e.print(cmd.OutOrStdout(), list, func(p *printer) {
				for _, d := range list {
					switch {
					case d.After == "":
						p.line("- %s: %s", d.What, d.Before)
					case d.Before == "":
						p.line("+ %s: %s", d.What, d.After)
					default:
						p.line("~ %s: %s -> %s", d.What, d.Before, d.After)
					}
				}
			}); err != nil {
				return err
			}
			if len(list) > 0 {
				return statusError(exitWarning)
			}
			return nil
		},
	}, "a list of objects with what, before and after")
}

func compare(a, b map[string]string) []difference {
	out := []difference{}
	for _, what := range slices.Sorted(maps.Keys(a)) {
		if a[what] != b[what] {
			out = append(out, difference{what, a[what], b[what]})
		}
	}
	for _, what := range slices.Sorted(maps.Keys(b)) {
		if _, both := a[what]; !both {
			out = append(out, difference{What: what, After: b[what]})
		}
	}
	slices.SortStableFunc(out, func(x, y difference) int { return strings.Compare(x.What, y.What) })
	return out
}

// facts are what two checkpoints can differ in, by name.
func facts(ctx context.Context, c *store.Checkpoint) (map[string]string, error) {
	l, err := c.Lock()
	if err != nil {
		return nil, err
	}
	defer l.Close()
	set, err := imageset.Open(c.Images())
	if err != nil {
		return nil, err
	}
	defer set.Close()
	m, out := set.Manifest, map[string]string{}
	put := func(v string, what string, args ...any) {
		if v != "" {
			out[fmt.Sprintf(what, args...)] = text.Line(v, text.MaxName)
		}
	}
	put(c.Of(), "container")
	put(c.Engine, "engine")
	put(c.Image, "image")
	put(strings.Join(m.Container.Args, " "), "command")
	put(m.Container.Hostname, "host name")
	put(optionsText(m.Options), "options")
	put(m.Guest.Kernel, "guest kernel")
	put(fmt.Sprint(m.Guest.CRIUVersion), "CRIU version")
	put(m.SignedBy, "signed by")
	if m.Rights != nil {
		put(fmt.Sprintf("%d:%d", m.Rights.UID, m.Rights.GID), "user")
		put(fmt.Sprint(m.Rights.NoNewPrivs), "no new privileges")
		put(fmt.Sprint(m.Rights.Seccomp), "seccomp profile")
		if caps := m.Rights.Capabilities; caps != nil {
			for _, name := range caps.Bounding {
				put("allowed", "capability %s", name)
			}
		}
	}
	for _, e := range m.Externals {
		put("from outside", "mount %s", e.Destination)
	}
	for _, f := range m.OpenFiles {
		put(fmt.Sprintf("%d bytes", f.Size), "open file %s", f.Path)
	}
	for _, t := range m.Connections {
		put("open", "connection %s to %s", t.Local, t.Remote)
	}
	for _, a := range m.Addresses {
		put(a.Address.String(), "address of %s", a.Interface)
	}
	size := sizesOf(c, m)
	put(progress.Bytes(size.Memory), "size of memory")
	put(progress.Bytes(size.DevShm), "size of /dev/shm")
	processes, err := criuimage.Tree(set.ReadFile)
	if err != nil {
		return nil, err
	}
	var walk func([]*criuimage.Process)
	walk = func(list []*criuimage.Process) {
		for _, p := range list {
			put(fmt.Sprintf("%s, %d threads", p.Name, p.Threads), "process %d", p.PID)
			walk(p.Children)
		}
	}
	walk(processes)
	if err := rootFiles(ctx, c, out); err != nil {
		return nil, fmt.Errorf("%s: %w", imageset.RootfsDiffName, err)
	}
	return out, nil
}

// maxRootFiles bounds the files of a root file system that are compared.
const maxRootFiles = 1 << 20

// rootFiles adds the files in the changes of the root file system.
func rootFiles(ctx context.Context, c *store.Checkpoint, out map[string]string) error {
	f, err := os.Open(c.File(imageset.RootfsDiffName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	stream, err := archive.Decompress(ctx, f)
	if err != nil {
		return err
	}
	defer stream.Close()
	r := tar.NewReader(stream)
	for range maxRootFiles {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		what := "file /" + text.Line(strings.TrimSuffix(h.Name, "/"), text.MaxName)
		switch h.Typeflag {
		case tar.TypeReg:
			sum := sha256.New()
			if _, err := io.Copy(sum, r); err != nil { //nolint:gosec // Decompress bounds it
				return err
			}
			out[what] = fmt.Sprintf("%d bytes, mode %o, SHA-256 %.6x", h.Size, h.Mode&0o7777, sum.Sum(nil))
		case tar.TypeDir:
			out[what] = fmt.Sprintf("directory, mode %o", h.Mode&0o7777)
		case tar.TypeSymlink:
			out[what] = "link to " + text.Line(h.Linkname, text.MaxName)
		default:
			out[what] = fmt.Sprintf("type %q", h.Typeflag)
		}
	}
	return fmt.Errorf("it has more than %d files", maxRootFiles)
}
