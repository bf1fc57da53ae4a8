// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Handler is the CRI's name for our runtime.
const Handler = "kata-checkpoint"

// The CRI's plugin has another name from version 3 of the configuration on.
const (
	criPlugin2 = "io.containerd.grpc.v1.cri"
	criPlugin3 = "io.containerd.cri.v1.runtime"
)

var containerdDropIn = template.Must(template.New("").Parse(`# Written by ` + "`kata-checkpoint install`, and removed by `kata-checkpoint uninstall`" + `.
version = {{.Version}}

[plugins.'{{.Plugin}}'.containerd.runtimes.{{.Handler}}]
  runtime_type = '{{.Runtime}}'
  # As for Kata itself: privileged containers do not get the host's devices.
  privileged_without_host_devices = true
  # Annotations that reach the shim: ours and Kata's.
  pod_annotations = ['{{.Annotations}}*', 'io.katacontainers.*']
  container_annotations = ['{{.Annotations}}*', 'io.katacontainers.*']

  [plugins.'{{.Plugin}}'.containerd.runtimes.{{.Handler}}.options]
    ConfigPath = '{{.KataConfig}}'
`))

const containerdMain = `# Written by ` + "`kata-checkpoint install`, and removed by `kata-checkpoint uninstall`" + `.
version = 3
imports = [%q]
`

// containerd is containerd's drop-in and, if there is no main configuration, one
// that imports it.
func (o *Options) containerd(kataConfig string, p *Plan) ([]*entry, error) {
	dir := filepath.Dir(o.ContainerdConfig) + "/conf.d"
	var main struct {
		Version int      `toml:"version"`
		Imports []string `toml:"imports"`
	}
	var entries []*entry
	data, err := os.ReadFile(o.at(o.ContainerdConfig))
	written := p.record.wrote(o.ContainerdConfig, digestOf(data))
	switch {
	case errors.Is(err, fs.ErrNotExist) || written:
		entries = append(entries, &entry{path: o.ContainerdConfig, mode: 0o644, data: fmt.Appendf(nil, containerdMain, dir+"/*.toml")})
		main.Version = 3
	case err != nil:
		return nil, err
	default:
		if err := toml.Unmarshal(data, &main); err != nil {
			return nil, errcode.ContainerdConfig.Errorf("containerd's configuration %s: %w", o.ContainerdConfig, err)
		}
		found := o.importedDir(main.Imports)
		if found == "" {
			p.todof("add the line imports = [%q] to the top of %s: containerd does not read %s without it", dir+"/*.toml", o.ContainerdConfig, dir)
		} else {
			dir = found
		}
	}
	values := map[string]any{
		"Version": 3, "Plugin": criPlugin3, "Handler": Handler, "Runtime": check.Runtime,
		"Annotations": annotations.Prefix, "KataConfig": kataConfig,
	}
	switch main.Version {
	case 4:
		values["Version"] = 4
	case 2:
		values["Version"], values["Plugin"] = 2, criPlugin2
	case 3:
	default:
		return nil, errcode.ContainerdConfig.Errorf("%s has version %d, which containerd 2.1 and later do not read: run containerd config migrate", o.ContainerdConfig, main.Version)
	}
	var b bytes.Buffer
	if err := containerdDropIn.Execute(&b, values); err != nil {
		return nil, err
	}
	return append(entries, &entry{path: dir + "/kata-checkpoint.toml", mode: 0o644, data: b.Bytes()}), nil
}

// importedDir is a directory whose files containerd imports: conf.d if it is one
// of them.
func (o *Options) importedDir(imports []string) string {
	found := ""
	for _, pattern := range imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(o.ContainerdConfig), pattern)
		}
		dir := filepath.Dir(pattern)
		if ok, err := filepath.Match(pattern, dir+"/kata-checkpoint.toml"); err != nil || !ok || strings.Contains(dir, "*") {
			continue
		}
		if found == "" || filepath.Base(dir) == "conf.d" {
			found = dir
		}
	}
	return found
}
