// SPDX-License-Identifier: Apache-2.0

package install

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// record is what an installation has written, in a file of its own: only that is
// ever changed or removed. It is written before anything else and after it, so
// that an installation that was interrupted can be repeated or undone.
type record struct {
	Version string `json:"version"`
	// Files are the digests of files, by path: the one that was written last, or
	// two where the last installation was interrupted.
	Files map[string][]string `json:"files"`
	// Dirs are the directories that were made, parents first.
	Dirs []string `json:"dirs"`
	// Settings are how it was installed, for the next time.
	Settings settings `json:"settings"`
	// Releases are the directories of guest bundles. VMs that run keep theirs.
	Releases []string `json:"releases"`
}

// settings are the options that describe the node.
type settings struct {
	ContainerdConfig string `json:"containerd_config"`
	Path             string `json:"containerd_path"`
	NRIPlugins       string `json:"nri_plugins"`
	KataShim         string `json:"kata_shim"`
	KataConfig       string `json:"kata_config"`
	Kernel           string `json:"kernel"`
}

func (o *Options) settings() settings {
	return settings{o.ContainerdConfig, o.Path, o.NRIPlugins, o.KataShim, o.KataConfig, o.Kernel}
}

// remember takes what was said the last time, unless it is said now.
func (o *Options) remember(r *record) {
	if o.Given == nil || len(r.Files) == 0 {
		return
	}
	for name, v := range map[string]struct {
		to   *string
		last string
	}{
		"containerd-config": {&o.ContainerdConfig, r.Settings.ContainerdConfig},
		"containerd-path":   {&o.Path, r.Settings.Path},
		"nri-plugins":       {&o.NRIPlugins, r.Settings.NRIPlugins},
		"kata-shim":         {&o.KataShim, r.Settings.KataShim},
		"kata-config":       {&o.KataConfig, r.Settings.KataConfig},
		"kernel":            {&o.Kernel, r.Settings.Kernel},
	} {
		if !o.Given(name) {
			*v.to = v.last
		}
	}
}

const recordName = "install.json"

func (o *Options) recordPath() string { return o.Dir + "/" + recordName }

// readRecord returns an empty record where nothing is installed.
func (o *Options) readRecord() (*record, error) {
	r := &record{Files: map[string][]string{}}
	data, err := os.ReadFile(o.at(o.recordPath()))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, errcode.InstallRecord.Errorf("%s is the record of what is installed, and is damaged: %w: restore it, or remove it and the files of the earlier installation by hand", o.recordPath(), err)
	}
	if r.Files == nil {
		r.Files = map[string][]string{}
	}
	return r, nil
}

func (r *record) encode() ([]byte, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	return append(data, '\n'), err
}

// wrote reports whether an installation has written a file of this content.
func (r *record) wrote(path, digest string) bool { return slices.Contains(r.Files[path], digest) }

// content is what is at a path: a file, a symbolic link, or nothing.
type content struct {
	exists bool
	mode   fs.FileMode
	data   []byte
	link   string
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (c *content) digest() string {
	if c.mode&fs.ModeSymlink != 0 {
		return "link:" + c.link
	}
	return digestOf(c.data)
}

// look reads what is at a path on the node.
func (o *Options) look(path string) (*content, error) {
	at := o.at(path)
	st, err := os.Lstat(at)
	if errors.Is(err, fs.ErrNotExist) {
		return &content{}, nil
	}
	if err != nil {
		return nil, err
	}
	c := &content{exists: true, mode: st.Mode()}
	switch {
	case st.Mode()&fs.ModeSymlink != 0:
		c.link, err = os.Readlink(at)
	case st.Mode().IsRegular():
		c.data, err = os.ReadFile(at)
	default:
		err = &fs.PathError{Op: "read", Path: path, Err: errors.New("neither a file nor a symbolic link")}
	}
	return c, err
}
