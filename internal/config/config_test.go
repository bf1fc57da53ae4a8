// SPDX-License-Identifier: Apache-2.0

package config

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

func TestShippedFileIsTheDefaults(t *testing.T) {
	shipped, err := os.ReadFile("../../configs/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := parse(shipped)
	if err != nil {
		t.Fatal(err)
	}
	want, err := parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("configs/config.toml differs from the defaults (-default +shipped):\n%s", diff)
	}
	// Shown means: every key is there, not left to the default.
	for _, key := range []string{
		"downstream_shim", "kata_config_path", "state_dir", "guest_bundle", "guest_agent", "agent_port", "agent_timeout",
		"freeze_timeout", "checkpoint_timeout", "exec_wait_timeout", "after_checkpoint", "after_checkpoint_cri",
		"max_image_files", "max_image_bytes", "reserve_bytes", "nri_runtime_handlers",
		"restore_dir", "signing_key", "trusted_keys", "restore_unsigned", "require_signature",
	} {
		if !strings.Contains(string(shipped), "\n"+key+" = ") {
			t.Errorf("configs/config.toml does not show %s", key)
		}
	}
}

const publicKey = `-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
`

func trusted(text string) []ed25519.PublicKey {
	keys, _ := signing.ParsePublic(text)
	return keys
}

func TestParse(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		want func(*Config)
		err  []string
	}{
		"empty":             {in: ""},
		"optional agent":    {in: `guest_agent = "optional"`, want: func(c *Config) { c.AgentOptional = true }},
		"durations":         {in: "agent_timeout = '1500ms'\nfreeze_timeout = '2m'", want: func(c *Config) { c.AgentTimeout, c.FreezeTimeout = 1500*time.Millisecond, 2*time.Minute }},
		"paths are cleaned": {in: `state_dir = "/a//b/"`, want: func(c *Config) { c.StateDir, c.SigningKey = "/a/b", "/a/b/signing-key.pem" }},
		"after":             {in: "after_checkpoint = 'leave-running'\nafter_checkpoint_cri = 'stop'", want: func(c *Config) { c.AfterCheckpoint, c.AfterCheckpointCRI = annotations.LeaveRunning, annotations.Stop }},
		"limits": {in: "max_image_files = 3\nmax_image_bytes = 4\nreserve_bytes = 0", want: func(c *Config) {
			c.MaxImageFiles, c.MaxImageBytes, c.ReserveBytes = 3, 4, 0
		}},
		"handlers": {in: "nri_runtime_handlers = ['a', '']", want: func(c *Config) { c.NRIRuntimeHandlers = []string{"a", ""} }},

		"a key":                  {in: "signing_key = '/k'\nrestore_unsigned = true\nrequire_signature = true", want: func(c *Config) { c.SigningKey, c.RestoreUnsigned, c.RequireSignature = "/k", true, true }},
		"a key beside the state": {in: "state_dir = '/s'", want: func(c *Config) { c.StateDir, c.SigningKey = "/s", "/s/signing-key.pem" }},
		"a trusted key":          {in: "trusted_keys = [\"\"\"\n" + publicKey + "\"\"\"]", want: func(c *Config) { c.TrustedKeys = trusted(publicKey) }},

		"a key by relative path":        {in: "signing_key = 'k'", err: []string{"signing_key"}},
		"a trusted key in another form": {in: "trusted_keys = ['ssh-ed25519 AAAA']", err: []string{"trusted_keys", "entry 1", "PEM"}},
		"not TOML":                      {in: "state_dir = /var\n", err: []string{"line 1", "not TOML"}},
		"unknown key":                   {in: "\nstate_dri = '/x'\n", err: []string{"line 2", "state_dri"}},
		"unknown keys":                  {in: "a = 1\n[b]\nc = 2\n", err: []string{"line 1: unknown key a", "unknown key b"}},
		"a key twice":                   {in: "agent_port = 1\nagent_port = 2\n", err: []string{"agent_port"}},
		"another type":                  {in: "agent_port = 'x'\n", err: []string{"line 1", "agent_port"}},
		"duration without unit":         {in: "agent_timeout = '10'", err: []string{"agent_timeout", `"10"`}},
		"no duration":                   {in: "exec_wait_timeout = 'soon'", err: []string{"exec_wait_timeout", "soon"}},
		"negative duration":             {in: "freeze_timeout = '-1s'", err: []string{"freeze_timeout"}},
		"zero duration":                 {in: "checkpoint_timeout = '0s'", err: []string{"checkpoint_timeout"}},
		"relative state_dir":            {in: "state_dir = 'x'", err: []string{"state_dir"}},
		"relative guest_bundle":         {in: "guest_bundle = './x'", err: []string{"guest_bundle"}},
		"relative Kata config":          {in: "kata_config_path = 'x'", err: []string{"kata_config_path"}},
		"shim by relative path":         {in: "downstream_shim = 'bin/shim'", err: []string{"downstream_shim"}},
		"no shim":                       {in: "downstream_shim = ''", err: []string{"downstream_shim"}},
		"agent neither":                 {in: "guest_agent = 'no'", err: []string{"guest_agent"}},
		"port 0":                        {in: "agent_port = 0", err: []string{"agent_port"}},
		"port VMADDR_PORT_ANY":          {in: "agent_port = 4294967295", err: []string{"agent_port"}},
		"a collector without a scheme":  {in: "traces_endpoint = '127.0.0.1:4318'", err: []string{"traces_endpoint"}},
		"a collector without a host":    {in: "traces_endpoint = 'http://'", err: []string{"traces_endpoint"}},
		"negative port":                 {in: "agent_port = -1", err: []string{"agent_port"}},
		"after neither":                 {in: "after_checkpoint = 'exit'", err: []string{"after_checkpoint"}},
		"no files":                      {in: "max_image_files = 0", err: []string{"max_image_files"}},
		"a negative reserve":            {in: "reserve_bytes = -1", err: []string{"reserve_bytes"}},
		"no bytes":                      {in: "max_image_bytes = -1", err: []string{"max_image_bytes"}},
		"no handlers":                   {in: "nri_runtime_handlers = []", err: []string{"nri_runtime_handlers"}},
		"all mistakes are said":         {in: "max_image_files = 0\nstate_dir = 'x'", err: []string{"max_image_files", "state_dir"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parse([]byte(tc.in))
			if tc.err != nil {
				if err == nil {
					t.Fatalf("no error, got %+v", got)
				}
				for _, part := range tc.err {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("error %q does not name %q", err, part)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want, err := parse(nil)
			if err != nil {
				t.Fatal(err)
			}
			if tc.want != nil {
				tc.want(want)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing.toml")

	t.Run("a missing file means the defaults", func(t *testing.T) {
		t.Setenv(PathEnv, "")
		if _, err := Load(missing); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("a missing file that the environment names is an error", func(t *testing.T) {
		t.Setenv(PathEnv, missing)
		if _, err := Load(Path()); err == nil || !strings.Contains(err.Error(), missing) {
			t.Fatalf("error %v does not name %s", err, missing)
		}
	})
	t.Run("the environment's file is read", func(t *testing.T) {
		path := filepath.Join(dir, "c.toml")
		if err := os.WriteFile(path, []byte("agent_port = 7"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv(PathEnv, path)
		c, err := Load(Path())
		if err != nil || c.AgentPort != 7 {
			t.Fatalf("got %+v, %v", c, err)
		}
	})
	t.Run("errors name the file", func(t *testing.T) {
		path := filepath.Join(dir, "bad.toml")
		if err := os.WriteFile(path, []byte("]"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Fatalf("error %v does not name %s", err, path)
		}
	})
}

// A sandbox keeps the guest bundle with which it was started.
func TestAgentStaysThatOfTheRelease(t *testing.T) {
	dir := t.TempDir()
	for _, release := range []string{"v1", "v2"} {
		if err := os.MkdirAll(filepath.Join(dir, release, "guest"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link, path := filepath.Join(dir, "guest"), filepath.Join(dir, "config.toml")
	if err := os.Symlink("v1/guest", link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, fmt.Appendf(nil, "guest_bundle = %q\n", link), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("v2/guest", link); err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(dir, "v1/guest/bin/kata-checkpoint-agent"); c.Agent() != want || c.GuestBundle != link {
		t.Errorf("the agent is %s, want %s; the bundle is %s", c.Agent(), want, c.GuestBundle)
	}
	plain := &Config{GuestBundle: "/b"}
	if plain.Agent() != "/b/bin/kata-checkpoint-agent" {
		t.Errorf("without a link the agent is %s", plain.Agent())
	}
}
