// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// What guest-initrd prints can be put into Kata's configuration.
func TestGuestInitrd(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{
		"bin/kata-checkpoint-agent", "bin/kata-checkpoint-helper", "bin/kata-checkpoint-launcher", "criu/bin/criu", "criu/bin/tar", "criu/bin/gzip",
		"hooks/prestart/kata-checkpoint-agent-hook",
	} {
		path := filepath.Join(dir, "bundle", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	kata, made := filepath.Join(dir, "kata.img"), filepath.Join(dir, "share/made.img")
	if err := os.WriteFile(kata, []byte("070701"), 0o644); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	args := []string{"guest-initrd", "--initrd", kata, "--bundle", filepath.Join(dir, "bundle"), "--out", made}
	if status := Run(t.Context(), args, &out, &errs); status != 0 {
		t.Fatalf("status %d: %s", status, errs.String())
	}
	_, lines, ok := strings.Cut(out.String(), "[hypervisor.NAME]")
	var settings struct {
		Initrd        string `toml:"initrd"`
		Image         string `toml:"image"`
		GuestHookPath string `toml:"guest_hook_path"`
	}
	if err := toml.Unmarshal([]byte(lines), &settings); err != nil || !ok || settings.Initrd != made || settings.GuestHookPath != guestinitrd.HookPath || !strings.Contains(lines, "image = ") {
		t.Errorf("%+v, %v: %s", settings, err, out.String())
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 81 && !strings.Contains(line, dir) {
			t.Errorf("longer than 80 columns: %s", line)
		}
	}
	if r, err := guestinitrd.Read(made); err != nil || r.Version != version.Version {
		t.Errorf("%+v, %v", r, err)
	}
	out.Reset()
	if status := Run(t.Context(), append(args, "--json"), &out, &errs); status != 0 {
		t.Fatalf("status %d: %s", status, errs.String())
	}
	var answer madeInitrd
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil || answer.Initrd != made || answer.Of != kata || answer.Added != answer.Bytes-6 {
		t.Errorf("%+v, %v", answer, err)
	}
	out.Reset()
	errs.Reset()
	args[2] = filepath.Join(dir, "none")
	if status := Run(t.Context(), args, &out, &errs); status != exitError || !strings.HasSuffix(errs.String(), "(KC-6031)\n") {
		t.Errorf("status %d: %s%s", status, out.String(), errs.String())
	}
}
