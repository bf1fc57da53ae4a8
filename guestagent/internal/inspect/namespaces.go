// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"errors"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// nested is the table of namespaces that a process below a container's init may
// have of its own, by their names in /proc/PID/ns. CRIU 4.2 dumps nested mount
// namespaces, refuses nested ones of the other kinds at the dump
// (criu/namespaces.c, generate_ns_id), and lets a network namespace pass that it
// then cannot restore, since init's own is the sandbox's and not in the images.
// A cgroup namespace is init's after a restore, see [Container.CgroupNamespaces].
var nested = map[string]rule{
	"cgroup": {},
	"net":    nestedNamespace("a network", "unshare -n or ip netns"),
	"user":   nestedNamespace("a user", "unshare -U, bubblewrap or a browser's sandbox"),
	"pid":    nestedNamespace("a PID", "unshare -p or a browser's sandbox"),
	"uts":    nestedNamespace("a UTS", "unshare -u"),
	"ipc":    nestedNamespace("an IPC", "unshare -i"),
	"time":   nestedNamespace("a time", "unshare -T"),
	// That of processes that are to be forked.
	"time_for_children": {Refused, errcode.Namespace, "has made a time namespace, as unshare -T does, which cannot be restored", "terminate it before the checkpoint, or run the program without that isolation"},
}

func nestedNamespace(kind, program string) rule {
	return rule{Refused, errcode.Namespace, "is in " + kind + " namespace of its own, as " + program + " makes one, which cannot be restored", "terminate it before the checkpoint, or run the program without that isolation"}
}

// readNamespaces returns the namespaces of a process as its links in /proc show
// them, by their names there. A zombie has none.
func readNamespaces(dir *procfs.Dir) (map[string]string, error) {
	out := make(map[string]string, len(nested))
	for name := range nested {
		link, err := dir.Link("ns/" + name)
		if gone(err) || errors.Is(err, unix.EACCES) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[name] = link
	}
	return out, nil
}

// nestedNamespaces finds processes with namespaces of their own, one finding
// for each kind and process.
func (c *Container) nestedNamespaces() (findings []Finding) {
	for _, p := range c.Processes {
		for _, name := range slices.Sorted(maps.Keys(p.Namespaces)) {
			if own := c.Root.Namespaces[name]; own != "" && p.Namespaces[name] != own && nested[name].class != Good {
				findings = append(findings, c.finding(p, nested[name]))
			}
		}
	}
	return findings
}

// CgroupNamespaces returns the PIDs of those processes whose cgroup namespace is
// not init's. The kata-agent gives each exec one, with the container's cgroup as
// its root like init's, and what an exec leaves behind keeps it. Their restored
// processes share one cgroup, and can share the namespace.
func (c *Container) CgroupNamespaces() (pids []int) {
	for _, p := range c.Processes {
		if ns := p.Namespaces["cgroup"]; ns != "" && ns != c.Root.Namespaces["cgroup"] {
			pids = append(pids, p.PID)
		}
	}
	return pids
}
