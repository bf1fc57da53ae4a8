// SPDX-License-Identifier: Apache-2.0

package bundle

import "path/filepath"

// bootstrapDir holds the bundles of bootstrap containers, below the state
// directory.
const bootstrapDir = "bootstrap"

// BootstrapDir is the bundle of a bootstrap container of a sandbox.
func BootstrapDir(stateDir, namespace, sandbox, id string) string {
	return filepath.Join(stateDir, bootstrapDir, namespace+"--"+sandbox+"--"+id)
}

// BootstrapGlob matches what bootstrap containers of a sandbox may have left.
func BootstrapGlob(stateDir, namespace, sandbox string) string {
	return BootstrapDir(stateDir, namespace, sandbox, "*")
}
