// SPDX-License-Identifier: Apache-2.0

package parts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Cases builds the programs of integration/cases, static and each of one source
// file, and returns their directory.
func (p *Parts) Cases(ctx context.Context) (string, error) {
	source := filepath.Join(p.root, "integration/cases")
	files, err := filepath.Glob(filepath.Join(source, "*.[ch]"))
	if err != nil {
		return "", fmt.Errorf("cases: %w", err)
	}
	var keys []string
	for _, file := range files {
		key, err := fileKey(file)
		if err != nil {
			return "", fmt.Errorf("cases: %w", err)
		}
		keys = append(keys, file, key)
	}
	return p.once(ctx, "cases", keyOf(keys...), func(ctx context.Context, path string) error {
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		for _, file := range files {
			name, isProgram := strings.CutSuffix(filepath.Base(file), ".c")
			if !isProgram {
				continue
			}
			if err := run(ctx, source, "gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", filepath.Join(path, name), file, "-lrt"); err != nil {
				return err
			}
		}
		return nil
	})
}
