// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// run runs a program in dir. Its error contains the end of the program's
// output.
func run(ctx context.Context, dir, name string, args ...string) error {
	return runWith(ctx, os.Environ(), dir, name, args...)
}

// runWith is run with another environment.
func runWith(ctx context.Context, env []string, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		const keep = 2000
		text := strings.TrimSpace(out.String())
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text[max(0, len(text)-keep):])
	}
	return nil
}
