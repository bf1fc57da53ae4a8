// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// setSysctls sets the sysctls with the prefix, below root, and removes them
// from the list. Kata: set_sysctls in src/agent/rustjail/src/container.rs.
func setSysctls(root string, sysctls map[string]string, prefix string) error {
	for name, value := range sysctls {
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		path := filepath.Join(root, filepath.Clean("/"+strings.ReplaceAll(name, ".", "/")))
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
		if err == nil {
			_, err = f.WriteString(value)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("set %s to %q: %w", name, value, err)
		}
		delete(sysctls, name)
	}
	return nil
}
