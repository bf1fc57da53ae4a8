// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"testing"
)

// What is accepted is usable: paths are absolute and numbers in their range.
func FuzzParse(f *testing.F) {
	whole, err := os.ReadFile("../../configs/config.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte("state_dir = '/a/../b'\nagent_port = 1\nfreeze_timeout = '1ns'\nreserve_bytes = 0"))
	f.Add([]byte("max_image_files = 9223372036854775807\nagent_port = -1"))
	f.Add([]byte("[x]\ny = 'z'"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse(data)
		if err != nil {
			return
		}
		for _, dir := range []string{c.StateDir, c.GuestBundle, c.RestoreDir} {
			if !filepath.IsAbs(dir) {
				t.Errorf("path %q", dir)
			}
		}
		if c.AgentPort == 0 || c.AgentTimeout <= 0 || c.FreezeTimeout <= 0 || c.CheckpointTimeout <= 0 || c.ExecWaitTimeout <= 0 ||
			c.MaxImageFiles <= 0 || c.MaxImageBytes <= 0 || c.ReserveBytes < 0 || len(c.NRIRuntimeHandlers) == 0 {
			t.Errorf("%+v", c)
		}
	})
}
