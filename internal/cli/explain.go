// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kata-checkpoint/kata-checkpoint/docs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

func explainCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "explain CODE",
		Short: "Explain the code of an error",
		Long: `Explain the code at the end of an error or of a finding: what was found, what
it is caused by, and what cures it. The same is in docs/troubleshooting.md.`,
		Example: `  kata-checkpoint explain KC-2001`,
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var codes []string
			for _, e := range errcode.All() {
				codes = append(codes, e.Code.String()+"\t"+e.Summary)
			}
			return codes, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			e, ok := errcode.Lookup(args[0])
			if !ok {
				return errcode.Usage.Errorf("there is no code %s: a code is at the end of an error, such as KC-2001", args[0])
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%v (%s): %s\n\n%s\n", e.Code, e.Name, e.Summary, entry(e.Code))
			return err
		},
	}
}

var (
	markdownLink = regexp.MustCompile(`\[([^\]]*)\]\(([^)]*)\)`)
	markdownCode = regexp.MustCompile("`([^`]*)`")
)

// entry is the entry of a code in docs/troubleshooting.md, without its markup.
func entry(c errcode.Code) string {
	_, text, _ := strings.Cut(docs.Troubleshooting, "\n### "+c.String()+"\n")
	text, _, _ = strings.Cut(text, "\n#")
	text = strings.ReplaceAll(strings.ReplaceAll(text, "**", ""), "\n> ", "\n  ")
	text = markdownLink.ReplaceAllString(text, "$1")
	return strings.TrimSpace(markdownCode.ReplaceAllString(text, "$1"))
}
