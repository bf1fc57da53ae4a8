// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/engine"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/export"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// restored is what restore prints.
type restored struct {
	Name string `json:"name"`
	// Container continues from it.
	Container string `json:"container,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	// Annotations are those of a pod whose containers continue from it.
	Annotations map[string]string `json:"annotations,omitempty"`
	Archives    []string          `json:"archives,omitempty"`
}

func restoreCommand() *cobra.Command {
	e := &everyday{}
	var namespace, into, fresh, log string
	c := e.base(&cobra.Command{
		Use:   "restore NAME",
		Short: "Continue a container from a checkpoint",
		Long: `Continue a container from a checkpoint.

A container of ctr, nerdctl or Docker continues itself, if it still exists and
does not run; with --container another one that is alike, and with --new a new
one that is made after it (of ctr). Its changes of the root file system are
applied again.

A container of a pod is restored by a pod: the checkpoint is put where pods
can be restored from (restore_dir in config.toml), and what is printed are the
annotations for the new pod. NAME may be that of all checkpoints of a pod.`,
		Example: `  kata-checkpoint restore before-upgrade
  kata-checkpoint restore before-upgrade --new web2 --log file:///var/log/web2
  kata-checkpoint restore monday >annotations`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, s, err := e.node()
			if err != nil {
				return err
			}
			defer n.Close()
			ctx, cancel := e.context(cmd)
			defer cancel()
			list, done, err := lockAll(s, args[0])
			if err != nil {
				return err
			}
			defer done()
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			r := &restorer{n: n, display: display, log: log}
			var out *restored
			switch {
			case into != "" || fresh != "" && len(list) == 1:
				out, err = r.into(ctx, list[0], namespace, into, fresh)
			case fresh == "" && list[0].Pod != nil:
				out, err = r.forPod(ctx, args[0], list)
			case len(list) > 1:
				err = errcode.Ambiguous.Errorf("%s is the name of %d checkpoints: name one of them", args[0], len(list))
			default:
				if namespace == "" {
					namespace = list[0].Namespace
				}
				out, err = r.into(ctx, list[0], namespace, list[0].Container, "")
			}
			display.Close()
			if err != nil {
				return interrupted(ctx, err)
			}
			return e.print(cmd.OutOrStdout(), out, out.print)
		},
	}, "the container that runs, or the pod's annotations")
	e.engine(c)
	flags := c.Flags()
	flags.StringVarP(&namespace, "namespace", "n", "", "containerd's `namespace` of the container")
	flags.StringVar(&into, "container", "", "continue in this `container` instead, which must not run")
	flags.StringVar(&fresh, "new", "", "make a new container with this `ID`")
	flags.StringVar(&log, "log", "", "`URI` for the output, such as file:///path (default: where it went before, if that is a URI)")
	c.MarkFlagsMutuallyExclusive("container", "new")
	return c
}

func (r *restored) print(p *printer) {
	if r.Container != "" {
		p.line("%s: container %s in namespace %s continues", r.Name, r.Container, r.Namespace)
		return
	}
	p.line("annotations:")
	for _, k := range slices.Sorted(maps.Keys(r.Annotations)) {
		p.line("  %s: %s", k, r.Annotations[k])
	}
}

// lockAll returns the checkpoint of a name, or those of a pod, which nobody
// removes until done is called.
func lockAll(s *store.Store, name string) (list []*store.Checkpoint, done func(), err error) {
	if list, err = byName(s, name); err != nil {
		return nil, nil, err
	}
	var locks []func() error
	done = func() {
		for _, l := range locks {
			_ = l()
		}
	}
	for _, c := range list {
		l, err := c.Lock()
		if err == nil {
			locks, err = append(locks, l.Close), c.Damage
			if err != nil {
				err = fmt.Errorf("checkpoint %s: %w", c.Name, err)
			}
		}
		if err != nil {
			done()
			return nil, nil, err
		}
	}
	return list, done, nil
}

// byName returns the checkpoint of a name, or those of a pod.
func byName(s *store.Store, name string) ([]*store.Checkpoint, error) {
	c, err := s.Open(name)
	if err == nil {
		return []*store.Checkpoint{c}, nil
	}
	if !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	list, gerr := s.Group(name)
	if gerr != nil {
		return nil, gerr
	}
	if len(list) == 0 {
		return nil, err
	}
	return list, nil
}

type restorer struct {
	n       *engine.Node
	display *progress.Display
	log     string
}

// into restores into a container, or a new one.
func (r *restorer) into(ctx context.Context, c *store.Checkpoint, namespace, ref, fresh string) (*restored, error) {
	bar := r.display.Bar(c.Name)
	o := engine.RestoreOptions{Log: r.log}
	if fresh != "" {
		made, err := r.n.RestoreNew(ctx, c, fresh, o, bar)
		if err != nil {
			return nil, err
		}
		bar.Done()
		return &restored{Name: c.Name, Container: made.ID, Namespace: made.Namespace}, nil
	}
	found, err := r.n.Find(ctx, namespace, ref)
	if err != nil {
		return nil, fmt.Errorf("%w; where the container of the checkpoint is gone, restore it into another one (--container) or a new one (--new)", err)
	}
	if found.Kind == engine.CRI {
		return nil, errcode.PodContainer.Errorf("container %s is one of a pod, which the CRI alone starts: create a pod with the annotations that kata-checkpoint restore %s prints", found, c.Name)
	}
	if err := found.Restore(ctx, c, o, bar); err != nil {
		return nil, err
	}
	bar.Done()
	return &restored{Name: c.Name, Container: found.ID, Namespace: found.Namespace}, nil
}

// forPod writes archives for a pod.
func (r *restorer) forPod(ctx context.Context, name string, list []*store.Checkpoint) (*restored, error) {
	out := &restored{Name: name}
	var err error
	if out.Annotations, err = engine.Annotations(list, func(c *store.Checkpoint) string { return archiveName(c) }); err != nil {
		return nil, err
	}
	for _, c := range list {
		bar := r.display.Bar(c.Name)
		path, err := forPod(ctx, r.n.Config, c, bar)
		if err != nil {
			return nil, fmt.Errorf("checkpoint %s: %w", c.Name, err)
		}
		bar.Done()
		out.Archives = append(out.Archives, path)
	}
	return out, nil
}

// archiveName is the name of a checkpoint's archive among those of the kubelet.
func archiveName(c *store.Checkpoint) string { return "kata-checkpoint-" + c.Name + ".tar" }

// forPod writes the archive of a checkpoint into restore_dir, in place of an
// earlier one of the same name.
func forPod(ctx context.Context, cfg *config.Config, c *store.Checkpoint, bar progress.Bar) (string, error) {
	if err := os.MkdirAll(cfg.RestoreDir, 0o700); err != nil {
		return "", err
	}
	path := filepath.Join(cfg.RestoreDir, archiveName(c))
	bar.Phase("archive", c.Size)
	return path, writeFile(path, func(f *os.File) error { return export.Write(ctx, f, c, export.None, nil, bar.Add) })
}

// writeFile writes a file that is complete when it has its name.
func writeFile(path string, write func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".kata-checkpoint-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
