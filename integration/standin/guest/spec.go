// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// bundleRoot has a directory for each container, as with Kata's agent:
// config.json and rootfs.
const bundleRoot = "/run/kata-containers"

// surroundings are the parts of the sandbox that a container's spec refers to.
type surroundings struct {
	cid string
	// ipc and uts are the sandbox's; pid is empty for a namespace of the
	// container's own.
	ipc, uts, pid string
	// hooks are the guest's own prestart hooks.
	hooks []string
	// self is the agent's binary.
	self string
	// annotate passes the annotations to the guest's hooks.
	annotate bool
}

// finish turns the host's spec into runc's. Some parts are not left to runc,
// because Kata does them differently: see [newTerminal] and [concealed].
func finish(spec *specs.Spec, s surroundings) {
	spec.Root.Path = filepath.Join(bundleRoot, s.cid, "rootfs")
	spec.Hostname, spec.Domainname = "", "" // the sandbox's
	spec.Process.Terminal = false
	spec.Process.ConsoleSize = nil

	linux := spec.Linux
	linux.CgroupsPath = cgroupPath(linux.CgroupsPath, s.cid)
	linux.MaskedPaths, linux.ReadonlyPaths = nil, nil
	namespaces := slices.DeleteFunc(linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.PIDNamespace || ns.Type == specs.CgroupNamespace
	})
	for i := range namespaces {
		switch namespaces[i].Type {
		case specs.IPCNamespace:
			namespaces[i].Path = s.ipc
		case specs.UTSNamespace:
			namespaces[i].Path = s.uts
		}
	}
	linux.Namespaces = append(namespaces,
		specs.LinuxNamespace{Type: specs.PIDNamespace, Path: s.pid},
		specs.LinuxNamespace{Type: specs.CgroupNamespace})

	if linux.Resources == nil {
		linux.Resources = &specs.LinuxResources{}
	}
	// Kata's agent restricts no devices on cgroup v2.
	linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}

	if len(s.hooks) > 0 && spec.Hooks == nil {
		spec.Hooks = &specs.Hooks{}
	}
	for _, path := range s.hooks {
		args := []string{filepath.Base(s.self), HookMode}
		if s.annotate {
			args = append(args, annotateFlag)
		}
		//nolint:staticcheck // deprecated; the only hook that runs before the pivot
		spec.Hooks.Prestart = append(spec.Hooks.Prestart, specs.Hook{Path: s.self, Args: append(args, "created", path)})
	}
}

// findHooks lists the guest's hooks of a kind: executable regular files, sorted
// by name. Symbolic links are skipped.
func findHooks(root, kind string) []string {
	dir := filepath.Join(root, kind)
	entries, err := os.ReadDir(dir)
	if err != nil {
		// A hook directory need not have hooks of all kinds.
		log.L.WithError(err).Info("no guest hooks")
		return nil
	}
	var hooks []string
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			hooks = append(hooks, filepath.Join(dir, e.Name()))
		}
	}
	return hooks
}
