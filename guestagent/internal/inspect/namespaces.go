// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// nested is the table of namespaces that a process below a container's init may
// have of its own, by their names in /proc/PID/ns. CRIU 4.2 dumps nested mount
// and cgroup namespaces, refuses nested ones of the other kinds at the dump
// (criu/namespaces.c, dump_namespaces), and lets a network namespace pass that
// it then cannot restore, since init's own is the sandbox's and not in the
// images.
var nested = map[string]rule{
	"net":  nestedNamespace("a network", "unshare -n or ip netns"),
	"user": nestedNamespace("a user", "unshare -U, bubblewrap or a browser's sandbox"),
	"pid":  nestedNamespace("a PID", "unshare -p or a browser's sandbox"),
	"uts":  nestedNamespace("a UTS", "unshare -u"),
	"ipc":  nestedNamespace("an IPC", "unshare -i"),
}

func nestedNamespace(kind, program string) rule {
	return rule{Refused, "is in " + kind + " namespace of its own, as " + program + " makes one, which cannot be restored", "terminate it before the checkpoint, or run the program without that isolation"}
}

// readNamespaces returns the namespaces of a process as its links in /proc show
// them, by their names there. A zombie has none.
func readNamespaces(pid int) (map[string]string, error) {
	out := make(map[string]string, len(nested))
	for name := range nested {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
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
			if own := c.Root.Namespaces[name]; own != "" && p.Namespaces[name] != own {
				findings = append(findings, c.finding(p, nested[name]))
			}
		}
	}
	return findings
}
