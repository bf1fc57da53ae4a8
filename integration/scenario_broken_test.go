// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// damages are what can be wrong with an image set, and the words with which a
// restore is refused.
var damages = []struct {
	name  string
	do    func(dir string) error
	words []string
}{
	{"a missing file", func(dir string) error { return os.Remove(filepath.Join(dir, "inventory.img")) }, []string{"inventory.img", "missing"}},
	{"a truncated file", func(dir string) error { return os.Truncate(largest(dir), 4096) }, []string{"pages-", "4096 bytes", "should have"}},
	{"a flipped bit", flipBit, []string{"pages-", "damaged", "digest"}},
	{"an unknown format version", func(dir string) error {
		return changeManifest(dir, func(m map[string]any) { m["formatVersion"] = 9999 })
	}, []string{"format version 9999"}},
	{"no manifest", func(dir string) error { return os.Remove(filepath.Join(dir, imageset.ManifestName)) }, []string{"not an image set", imageset.ManifestName}},
	{"half a manifest", func(dir string) error { return os.Truncate(filepath.Join(dir, imageset.ManifestName), 100) }, []string{imageset.ManifestName, "damaged"}},
	{"a file too many", func(dir string) error { return os.WriteFile(filepath.Join(dir, "extra.img"), []byte("extra"), 0o600) }, []string{"extra.img", "is not listed"}},
	{"a symbolic link", func(dir string) error {
		path := filepath.Join(dir, "inventory.img")
		return errors.Join(os.Rename(path, path+".elsewhere"), os.Symlink("inventory.img.elsewhere", path))
	}, []string{"inventory.img"}},
	{"a path out of the directory", func(dir string) error {
		return changeManifest(dir, func(m map[string]any) { m["files"].([]any)[0].(map[string]any)["name"] = "../outside" })
	}, []string{"../outside", "not allowed"}},
	{"an absolute path", func(dir string) error {
		return changeManifest(dir, func(m map[string]any) { m["files"].([]any)[0].(map[string]any)["name"] = "/etc/passwd" })
	}, []string{"/etc/passwd", "not allowed"}},
}

// brokenImages: of an image set that is not whole nothing is started, and the
// refusal says what is wrong with it.
func brokenImages(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	good := s.checkpoint(first, true)
	s.waitExit(first, 137)
	s.checkExitEvents(c, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)

	for _, damage := range damages {
		bad := s.newDir()
		s.check(os.CopyFS(bad, os.DirFS(good)))
		s.check(damage.do(bad))
		run, err := s.engine.Restore(s.ctx, c, bad)
		if err == nil {
			s.Errorf("with %s it was restored", damage.name)
			s.check(s.engine.EndTask(s.ctx, c))
			_ = run
			continue
		}
		s.Logf("with %s: %v", damage.name, err)
		for _, word := range damage.words {
			if !strings.Contains(err.Error(), word) {
				s.Errorf("with %s the refusal does not say %q: %v", damage.name, word, err)
			}
		}
		if left := s.settledResidue(); len(left) > 0 {
			s.Errorf("with %s there is left: %q", damage.name, left)
		}
	}
	s.checkExitEvents(c, 137) // nothing was started that could have ended
	s.step("refused %d image sets", len(damages))

	restored := s.restore(c, good)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.checkStatus(restored, client.Running)
}

func largest(dir string) string {
	var path string
	var size int64
	found, _ := filepath.Glob(filepath.Join(dir, "pages-*.img"))
	for _, p := range found {
		if info, err := os.Stat(p); err == nil && info.Size() > size {
			path, size = p, info.Size()
		}
	}
	return path
}

func flipBit(dir string) error {
	path := largest(dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 4
	return os.WriteFile(path, data, 0o600)
}

// changeManifest keeps what it does not know.
func changeManifest(dir string, change func(map[string]any)) error {
	path := filepath.Join(dir, imageset.ManifestName)
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var m map[string]any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&m); err != nil {
		return err
	}
	change(m)
	changed, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if bytes.Equal(changed, data) {
		return fmt.Errorf("%s is as it was", path)
	}
	return os.WriteFile(path, changed, 0o600)
}
