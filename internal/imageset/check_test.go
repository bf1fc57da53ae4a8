// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"maps"
	"strings"
	"testing"
)

// Each string and each list of a manifest has a grammar. What has none reached
// CRIU's option parser once: the name "m0]:/\x00" of an external mount gave a
// container the guest's root.
func TestManifestGrammar(t *testing.T) {
	external := func(name, destination string) map[string]any {
		return map[string]any{"externals": []any{map[string]any{"name": name, "destination": destination}}}
	}
	stdio := func(fd int, key string) map[string]any {
		return map[string]any{"stdio": []any{map[string]any{"fd": fd, "key": key}}}
	}
	container := func(key string, value any) map[string]any {
		return map[string]any{"container": map[string]any{"id": "c1", "namespace": "ns", key: value}}
	}
	many := func(n int, v any) []any {
		out := make([]any, n)
		for i := range out {
			out[i] = v
		}
		return out
	}
	for name, tc := range map[string]struct {
		set map[string]any
		err string
	}{
		"what a container has": {map[string]any{
			"externals": []any{map[string]any{"name": "m0", "destination": "/data", "fsType": "virtiofs"}, map[string]any{"name": "m1", "destination": "/ü b", "device": true}},
			"stdio":     []any{map[string]any{"fd": 0}, map[string]any{"fd": 1, "key": "pipe:[4026531840]"}, map[string]any{"fd": 2, "key": "tty[8803:17]"}},
			"openFiles": []any{map[string]any{"path": "/log\nfile", "size": 7}}, "options": map[string]any{"emptyNamespaces": []any{"network"}},
			"phases": []any{map[string]any{"name": "guest: save /dev/shm", "nanoseconds": 1}},
			"guest":  map[string]any{"kernel": "6.18.2", "criuVersion": 40201, "cpuFeatures": []any{"avx512_vnni", "sse4_1"}},
		}, ""},
		"a path behind a name":         {external("m0]:/\x00", "/data"), "external mount 0"},
		"CRIU's automatic mode":        {external("", "/data"), "external mount 0"},
		"another number":               {external("m1", "/data"), "external mount 0"},
		"a relative destination":       {external("m0", "data"), "not a clean absolute path"},
		"a destination with ..":        {external("m0", "/data/.."), "not a clean absolute path"},
		"the root as destination":      {external("m0", "/"), "not a clean absolute path"},
		"a destination with a NUL":     {external("m0", "/data\x00"), "control characters"},
		"an endless destination":       {external("m0", "/"+strings.Repeat("x", maxPath)), "longer than"},
		"any descriptor":               {stdio(4711, "pipe:[7]"), "descriptor 4711"},
		"any file of the images":       {stdio(1, "any file of the images"), "invalid key"},
		"a key with a NUL":             {stdio(1, "pipe:[7]\x00"), "invalid key"},
		"a descriptor twice":           {map[string]any{"stdio": []any{map[string]any{"fd": 1}, map[string]any{"fd": 1}}}, "twice"},
		"a mount twice":                {map[string]any{"externals": []any{map[string]any{"name": "m0", "destination": "/a"}, map[string]any{"name": "m1", "destination": "/a"}}}, "twice"},
		"too many mounts":              {map[string]any{"externals": many(maxMounts+1, map[string]any{"name": "m0", "destination": "/a"})}, "at most"},
		"too many phases":              {map[string]any{"phases": many(maxPhases+1, map[string]any{"name": "x"})}, "at most"},
		"a phase that clears a screen": {map[string]any{"phases": []any{map[string]any{"name": "\x1b[2J"}}}, "control characters"},
		"a negative duration":          {map[string]any{"phases": []any{map[string]any{"name": "x", "nanoseconds": -1}}}, "negative"},
		"a host name of 4 KiB":         {container("hostname", strings.Repeat("x", 4096)), "host name"},
		"a name that clears a screen":  {container("id", "\x1b[2J"), "container ID"},
		"an argument with a NUL":       {container("args", []any{"sh\x00"}), "has a NUL"},
		"a namespace":                  {map[string]any{"options": map[string]any{"emptyNamespaces": []any{"user"}}}, "cannot be empty"},
		"a relative file":              {map[string]any{"openFiles": []any{map[string]any{"path": "etc"}}}, "absolute path"},
		"a file with a NUL":            {map[string]any{"openFiles": []any{map[string]any{"path": "/e\x00"}}}, "absolute path"},
		"a feature that is a sentence": {map[string]any{"guest": map[string]any{"cpuFeatures": []any{"a b"}}}, "CPU feature"},
		"an attribute without a name":  {map[string]any{"attributes": []any{map[string]any{"pid": 1, "name": "", "value": "1"}}}, "invalid name or value"},
		"an attribute of two lines":    {map[string]any{"attributes": []any{map[string]any{"pid": 1, "name": "cpus", "value": "1\n2"}}}, "invalid name or value"},
		"too many attributes":          {map[string]any{"attributes": many(maxAttributes+1, map[string]any{"pid": 1, "name": "cpus", "value": "1"})}, "at most"},
		"a connection without an end":  {map[string]any{"connections": []any{map[string]any{"local": "192.0.2.1:80"}}}, "lacks an end"},
		"credentials of an old CRIU":   {map[string]any{"files": []any{map[string]any{"name": "creds-1.img", "blake3": digest("")}}}, "creds-1.img"},
		"a digest of other characters": {map[string]any{"files": []any{map[string]any{"name": "inventory.img", "blake3": strings.Repeat("z", 64)}}}, "digest"},
		"sizes that overflow": {map[string]any{"files": []any{
			map[string]any{"name": "inventory.img", "size": 1, "blake3": digest("")}, map[string]any{"name": "pages-1.img", "size": int64(1<<63 - 1), "blake3": digest("")},
		}}, "size"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newSet(t, someFiles)
			edit(t, dir, func(m map[string]any) {
				maps.Copy(m, tc.set)
			})
			set, err := Open(dir)
			if err == nil {
				set.Close()
			}
			if tc.err == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, "damaged", tc.err)
		})
	}
}

func TestIsImage(t *testing.T) {
	for name, want := range map[string]bool{
		"inventory.img": true, "core-1.img": true, "core-4194304.img": true, "ghost-file-1a.img": true, "tcp-stream-ff.img": true,
		"pagemap-shmem-18446744073709551615.img": true, "tmpfs-dev-52.tar.gz.img": true, "dev-shm.tar": true, "ipcns-var-11.img": true,
		"core-01.img": false, "core-.img": false, "core-1.img.new": false, "core-1-2.img": false, "ghost-file-1G.img": false, "xcore-1.img": false,
		// What CRIU reads and a container in a guest never has.
		"creds-1.img": false, "userns-9.img": false, "netns-9.img": false, "netdev-9.img": false, "iptables-9.img": false, "nftables-9.img": false,
		"utsns-9.img": false, "apparmor.img": false, "binfmt-misc.img": false, "autofs-9.img": false, "reg-files.img": false, "cpuinfo.img": false,
		ManifestName: false, "parent": false, "dump.log": false, "": false,
	} {
		if got := IsImage(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}
