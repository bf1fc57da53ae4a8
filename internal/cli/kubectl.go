// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/internal/kubelet"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// KubectlName is the name by which kubectl finds the command as its plugin.
const KubectlName = "kubectl-kata_checkpoint"

// Main runs the command line that the program's name stands for.
func Main(ctx context.Context, argv []string, stdout, stderr io.Writer) int {
	if filepath.Base(argv[0]) == KubectlName {
		return run(ctx, KubectlCommand(), argv[1:], stdout, stderr)
	}
	return Run(ctx, argv[1:], stdout, stderr)
}

// KubectlCommand is the command line as a plugin of kubectl.
func KubectlCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           KubectlName,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl kata-checkpoint"},
		Short:         "Checkpoint pods that run in Kata Containers VMs",
		Version:       version.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          showHelp,
	}
	wrapHelp(root)
	root.AddCommand(kubectlCreateCommand())
	return root
}

func kubectlCreateCommand() *cobra.Command {
	e := &everyday{}
	var o kubelet.Options
	var container string
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "create POD",
		Short: "Make a checkpoint of a pod's containers, on its node",
		Long: `Make a checkpoint of a container of a pod, or of all of them one after the
other, by the checkpoint API of the kubelet on its node. The containers keep
running.

The archives stay on the node. What is printed is the annotation by which a pod
on this node continues from each. You need the verb create on nodes/proxy.`,
		Example: `  kubectl kata-checkpoint create web --container app`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster, err := kubelet.Connect(o)
			if err != nil {
				return err
			}
			display, err := e.display(cmd)
			if err != nil {
				return err
			}
			bar := display.Bar(args[0])
			bar.Phase("checkpoint", 0)
			made, err := cluster.Checkpoint(cmd.Context(), args[0], container, timeout)
			display.Close()
			if made == nil {
				made = []kubelet.Archive{}
			}
			if perr := e.print(cmd.OutOrStdout(), made, func(p *printer) {
				for _, a := range made {
					p.line("%s on node %s: %s", a.Container, a.Node, a.Path)
					p.line("  %s: %s", a.Annotation, a.Value)
				}
			}); perr != nil {
				return perr
			}
			if err != nil && cmd.Context().Err() != nil {
				return fmt.Errorf("interrupted: the kubelet may finish what it has begun: %w", err)
			}
			return err
		},
	}
	flags := c.Flags()
	flags.StringVarP(&o.Namespace, "namespace", "n", "", "the pod's `namespace` (default: that of the context)")
	flags.StringVar(&o.Context, "context", "", "`context` of the kubeconfig")
	flags.StringVar(&o.Kubeconfig, "kubeconfig", "", "the kubeconfig, a `file` (default: as kubectl)")
	flags.StringVarP(&container, "container", "c", "", "one `container` of the pod")
	flags.DurationVar(&timeout, "timeout", 5*time.Minute, "`time` that the kubelet gives each container")
	flags.BoolVar(&e.json, "json", false, "print JSON: a list of the archives")
	e.long(c)
	return c
}
