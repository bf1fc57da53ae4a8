// SPDX-License-Identifier: Apache-2.0

package task

import (
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

// Pods are restored from what a trusted key has signed; other engines' users are
// warned, unless the configuration says otherwise.
func TestSignedImageSets(t *testing.T) {
	node := t.TempDir()
	path := t.TempDir()
	before := newHarness(t, onNode(node))
	before.run(podContainer())
	if err := before.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	key, err := signing.Load(filepath.Join(node, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	unsigned := filepath.Join(t.TempDir(), "unsigned")
	if err := errors.Join(os.CopyFS(unsigned, os.DirFS(path)), os.Remove(filepath.Join(unsigned, imageset.SignatureName))); err != nil {
		t.Fatal(err)
	}
	trusting := func(c *config.Config) { c.TrustedKeys = []ed25519.PublicKey{key.Public()} }
	elsewhere := func(_ *harness) {}
	for name, tc := range map[string]struct {
		path   string
		change func(*specs.Spec)
		node   option
		config func(*config.Config)
		err    string
	}{
		"a pod, on the same node":             {path, podContainer(), onNode(node), nil, ""},
		"a pod, on a node that trusts it":     {path, podContainer(), elsewhere, trusting, ""},
		"a pod, on another node":              {path, podContainer(), elsewhere, nil, "add the public key of the node that made it to trusted_keys in config.toml, or set restore_unsigned = true"},
		"a pod, unsigned":                     {unsigned, podContainer(), onNode(node), nil, "it is not signed: make it on a node that signs its checkpoints, or set restore_unsigned = true"},
		"a pod, unsigned, allowed":            {unsigned, podContainer(), onNode(node), func(c *config.Config) { c.RestoreUnsigned = true }, ""},
		"an engine, on another node":          {path, nil, elsewhere, nil, ""},
		"an engine, unsigned":                 {unsigned, nil, onNode(node), nil, ""},
		"an engine, unsigned, forbidden":      {unsigned, nil, onNode(node), func(c *config.Config) { c.RequireSignature = true }, "it is not signed: make it on a node that signs its checkpoints, or set require_signature = false"},
		"an engine, the same node, forbidden": {path, nil, onNode(node), func(c *config.Config) { c.RequireSignature = true }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, tc.node)
			if tc.config != nil {
				tc.config(h.cfg)
			}
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(tc.change), Checkpoint: tc.path})
			if tc.err == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, tc.err)
			h.wantCalls("Kata", h.kata.Calls())
			if exists(h.exchange()) {
				t.Error("the exchange directory is left")
			}
		})
	}
}

// A manifest that somebody has changed since is not what was signed.
func TestForgedImageSet(t *testing.T) {
	node, path := t.TempDir(), t.TempDir()
	before := newHarness(t, onNode(node))
	before.run(podContainer())
	if err := before.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(path, imageset.ManifestName)
	data, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(manifest, append(data, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*specs.Spec){"a pod": podContainer(), "an engine": nil} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, onNode(node))
			h.cfg.RestoreUnsigned = true // which this is not
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(change), Checkpoint: path})
			wantError(t, err, "its signature is not that of its manifest: use another copy of the checkpoint")
		})
	}
}

// Without a key nothing is frozen.
func TestCheckpointWithoutAKey(t *testing.T) {
	h := newHarness(t)
	if err := errors.Join(os.MkdirAll(filepath.Dir(h.cfg.SigningKey), 0o700), os.WriteFile(h.cfg.SigningKey, []byte("no key"), 0o600)); err != nil {
		t.Fatal(err)
	}
	h.run(nil)
	wantError(t, h.checkpoint(t.TempDir(), nil), "key of this node for image sets", "has no PEM block")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1")
	h.wantStatus("RUNNING")
}
