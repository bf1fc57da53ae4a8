// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/criuimage"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// inspected is what inspect prints.
type inspected struct {
	*store.Record
	Path string `json:"path"`
	Keep bool   `json:"keep"`
	// SignedBy is the fingerprint of the key, Trust one of "trusted", "untrusted",
	// "forged" and "unsigned".
	SignedBy  string               `json:"signedBy,omitempty"`
	Trust     string               `json:"trust"`
	Sizes     sizes                `json:"bytes"`
	Options   imageset.Options     `json:"options"`
	Guest     imageset.Guest       `json:"guest"`
	Args      []string             `json:"args,omitempty"`
	Processes []*criuimage.Process `json:"processes"`
	// Differences are sentences: what is not as before after a restore.
	Differences []string         `json:"differences"`
	Phases      []imageset.Phase `json:"phases"`
}

// sizes are those of a checkpoint's parts, in bytes.
type sizes struct {
	Total  int64 `json:"total"`
	Memory int64 `json:"memory"`
	DevShm int64 `json:"devShm"`
	Rootfs int64 `json:"rootfsDiff"`
	Other  int64 `json:"other"`
}

func sizesOf(c *store.Checkpoint, m *imageset.Manifest) sizes {
	s := sizes{Total: c.Size}
	for _, f := range m.Files {
		switch {
		case strings.HasPrefix(f.Name, "pages-"):
			s.Memory += f.Size
		case f.Name == imageset.DevShmName:
			s.DevShm = f.Size
		}
	}
	for _, f := range c.Files {
		if f.Name == imageset.RootfsDiffName {
			s.Rootfs = f.Size
		}
	}
	s.Other = s.Total - s.Memory - s.DevShm - s.Rootfs
	return s
}

func inspectCommand() *cobra.Command {
	e := &everyday{}
	return e.base(&cobra.Command{
		Use:   "inspect NAME",
		Short: "Show what is in a checkpoint",
		Long: `Show what is in a checkpoint: the container, who has signed it, sizes, options,
the processes, what is not as before after a restore, and how long each phase
took.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, s, err := e.load()
			if err != nil {
				return err
			}
			list, done, err := lockAll(s, args[0])
			if err != nil {
				return err
			}
			defer done()
			var all []*inspected
			for _, c := range list {
				i, err := inspect(cfg, c)
				if err != nil {
					return err
				}
				all = append(all, i)
			}
			if e.json && len(all) == 1 {
				return printJSON(cmd.OutOrStdout(), all[0])
			}
			return e.print(cmd.OutOrStdout(), all, func(p *printer) {
				for n, i := range all {
					if n > 0 {
						p.line("")
					}
					i.print(p, colour(p.w))
				}
			})
		},
	}, "an object, or a list of them for a pod")
}

func inspect(cfg *config.Config, c *store.Checkpoint) (*inspected, error) {
	set, err := imageset.Open(c.Images())
	if err != nil {
		return nil, err
	}
	defer set.Close()
	m := set.Manifest
	i := &inspected{
		Record: c.Record, Path: c.Path, Keep: c.Keep, SignedBy: m.SignedBy, Sizes: sizesOf(c, m), Options: m.Options, Guest: m.Guest,
		Args: m.Container.Args, Phases: m.Phases, Differences: differences(c, m),
	}
	keys, _, err := trusted(cfg)
	if err != nil {
		return nil, err
	}
	i.Trust = trustOf(set.Verify(keys))
	if i.Processes, err = criuimage.Tree(set.ReadFile); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", c.Name, err)
	}
	return i, nil
}

// maxNamed bounds how many of a kind are named in a sentence.
const maxNamed = 8

func named(all []string) string {
	if len(all) > maxNamed {
		return strings.Join(all[:maxNamed], ", ") + fmt.Sprintf(" and %d more", len(all)-maxNamed)
	}
	return strings.Join(all, ", ")
}

// differences are what is not as before after a restore, or has to be there.
func differences(c *store.Checkpoint, m *imageset.Manifest) (out []string) {
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	add("The wall clock is that of the new machine; the monotonic clock continues.")
	add("The host name, /etc/hosts and /etc/resolv.conf are the new container's; the host name was %q.", m.Container.Hostname)
	add("A process that was started by an exec is not in the checkpoint.")
	if len(m.Addresses) > 0 {
		var list []string
		for _, a := range m.Addresses {
			if !a.Address.IsLinkLocalUnicast() {
				list = append(list, a.Address.String()+" on "+a.Interface)
			}
		}
		if len(list) > 0 {
			add("The addresses are the new container's, and sockets that are bound to an old one get the new one; they were %s.", named(list))
		}
	}
	if len(m.Connections) > 0 {
		var list []string
		for _, t := range m.Connections {
			list = append(list, t.Local.String()+" to "+t.Remote.String())
		}
		switch {
		case m.Options.TCPClose:
			add("TCP connections are closed.")
		default:
			add("TCP connections continue if the address is the same and the peer has kept them: %s.", named(list))
		}
	}
	var content []string
	for _, e := range m.Externals {
		if slices.Contains(m.Container.Mounts, e.Destination) {
			content = append(content, e.Destination)
		}
	}
	if len(content) > 0 {
		add("What is mounted from outside is as it is then: %s.", named(content))
	}
	if n := slices.IndexFunc(c.Files, func(f imageset.File) bool { return f.Name == imageset.RootfsDiffName }); n < 0 {
		add("The root file system is the container's own, as it is then.")
	}
	var files []string
	for _, f := range m.OpenFiles {
		if !f.MayGrow {
			files = append(files, fmt.Sprintf("%s (%d bytes)", f.Path, f.Size))
		}
	}
	if len(files) > 0 {
		add("Files that are open must have the size that they had: %s.", named(files))
	}
	if m.Terminal {
		add("The container must have a terminal.")
	}
	if c.Pod != nil {
		add("/dev/shm is the pod's: the first container that is restored brings its files, later ones those that are missing.")
	}
	return out
}

func (i *inspected) print(p *printer, colours bool) {
	field := func(name, format string, args ...any) {
		p.wrap(fmt.Sprintf("%-11s", name+":"), 11, fmt.Sprintf(format, args...))
	}
	field("Name", "%s%s", i.Name, map[bool]string{true: " (kept)"}[i.Keep])
	field("Container", "%s, ID %s in namespace %s of %s", i.Of(), i.Container, i.Namespace, i.Engine)
	if i.Image != "" {
		field("Image", "%s", i.Image)
	}
	if len(i.Args) > 0 {
		field("Command", "%s", text.Line(strings.Join(i.Args, " "), text.MaxName))
	}
	field("Created", "%s; the container %s", i.Created.Local().Format(time.RFC1123Z), map[bool]string{true: "was stopped", false: "kept running"}[i.Stopped])
	if i.Imported != "" {
		field("Imported", "from %s", text.Line(filepath.Base(i.Imported), text.MaxName))
	}
	field("Signature", "%s", map[string]string{
		"trusted": "by " + i.SignedBy + ", which this node trusts", "untrusted": "by " + i.SignedBy + ", which this node does not trust",
		"forged": "not that of the manifest: it was changed", "unsigned": "none",
	}[i.Trust])
	field("Size", "%s: memory %s, /dev/shm %s, root file system %s, other %s", progress.Bytes(i.Sizes.Total), progress.Bytes(i.Sizes.Memory),
		progress.Bytes(i.Sizes.DevShm), progress.Bytes(i.Sizes.Rootfs), progress.Bytes(i.Sizes.Other))
	field("Guest", "Linux %s, CRIU %d.%d.%d", i.Guest.Kernel, i.Guest.CRIUVersion/10000, i.Guest.CRIUVersion/100%100, i.Guest.CRIUVersion%100)
	field("Options", "%s", optionsText(i.Options))
	p.line("Processes:")
	for _, root := range i.Processes {
		tree(p, root, "  ", "  ")
	}
	p.line("After a restore:")
	for _, d := range i.Differences {
		p.wrap("  - ", 4, d)
	}
	i.printPhases(p, colours)
}

func optionsText(o imageset.Options) string {
	var list []string
	for _, v := range []struct {
		set  bool
		name string
	}{
		{o.TCPEstablished, "TCP connections are kept"}, {o.TCPClose, "TCP connections are closed"}, {o.ExternalUnixSockets, "external unix sockets"},
		{o.Terminal, "shell job"}, {o.FileLocks, "file locks"},
	} {
		if v.set {
			list = append(list, v.name)
		}
	}
	for _, ns := range o.EmptyNamespaces {
		list = append(list, "empty namespace "+ns)
	}
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

func tree(p *printer, process *criuimage.Process, first, more string) {
	note := ""
	if process.Threads > 1 {
		note = fmt.Sprintf(" (%d threads)", process.Threads)
	}
	if process.Zombie {
		note = " (zombie)"
	}
	p.line("%s%d %s%s", first, process.PID, process.Name, note)
	for n, child := range process.Children {
		if n == len(process.Children)-1 {
			tree(p, child, more+"`- ", more+"   ")
		} else {
			tree(p, child, more+"|- ", more+"|  ")
		}
	}
}

// printPhases prints a bar for the time of each phase.
func (i *inspected) printPhases(p *printer, colours bool) {
	const longest = 40
	p.line("Time:      %.2f s in all, of which the container was frozen for %.2f s", i.Took.Seconds(), i.Frozen.Seconds())
	var most time.Duration
	for _, ph := range i.Phases {
		most = max(most, ph.Duration)
	}
	for _, ph := range i.Phases {
		bar := ""
		if most > 0 {
			bar = strings.Repeat("#", int(max(0, ph.Duration)*longest/most))
		}
		if colours && bar != "" {
			bar = "\x1b[36m" + bar + "\x1b[0m"
		}
		p.line("  %s", strings.TrimRight(fmt.Sprintf("%-20s %8.3f s  %s", text.Line(ph.Name, 20), ph.Duration.Seconds(), bar), " "))
	}
}

// wrap prints a text in lines of at most 80 columns. The first begins with a
// prefix, the others with so many spaces.
func (p *printer) wrap(prefix string, indent int, s string) {
	line := prefix
	for word := range strings.FieldsSeq(s) {
		if len(line)+1+len(word) > columns && len(line) > indent {
			p.line("%s", strings.TrimRight(line, " "))
			line = strings.Repeat(" ", indent)
		}
		if len(line) > indent {
			line += " "
		}
		line += word
	}
	p.line("%s", line)
}
