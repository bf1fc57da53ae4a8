// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Inventory lists what belongs to the testbed and to the given containers on
// the machine, one item a line, in words: processes, their descriptors, mounts
// in all of their mount namespaces, cgroups, listening sockets, and files
// outside of containerd's own store. Numbers and the containers' names are left
// out, so that two inventories of equal things are equal.
//
// containerd's descriptors are not listed: it opens files lazily and keeps some
// open.
func (t *Testbed) Inventory(containers ...string) ([]string, error) {
	processes, err := t.owned()
	if err != nil {
		return nil, err
	}
	var out []string
	add := func(what, item string) { out = append(out, what+" "+anonymous(item, containers)) }
	namespaces := map[string]string{"self": "/proc/self/mountinfo"}
	for _, p := range processes {
		if p == t.Containerd || t.CRI != nil && p == t.CRI.NRI {
			continue
		}
		dir := fmt.Sprintf("/proc/%d/", p.PID)
		comm, err := os.ReadFile(dir + "comm")
		if err != nil {
			continue // it has exited
		}
		name := strings.TrimSpace(string(comm))
		cmdline, _ := os.ReadFile(dir + "cmdline")
		add("process", name+": "+string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		for _, target := range links(dir + "fd") {
			add("descriptor of "+name+":", target)
		}
		if ns, err := os.Readlink(dir + "ns/mnt"); err == nil && namespaces[ns] == "" {
			namespaces[ns] = dir + "mountinfo"
		}
	}
	if own, err := os.Readlink("/proc/self/ns/mnt"); err == nil {
		delete(namespaces, own)
	}
	for _, mountinfo := range namespaces {
		all, err := mountsOf(mountinfo)
		if err != nil {
			continue // of a process that has exited
		}
		for _, m := range all {
			if t.concerns(m.path, containers) {
				add("mount", m.path)
			}
		}
	}
	for socket := range listening(processes) {
		add("socket", socket)
	}
	files, err := t.files(containers)
	for _, path := range files {
		add("file", path)
	}
	slices.Sort(out)
	return out, err
}

// concerns reports whether a path belongs to the testbed or to one of the
// containers.
func (t *Testbed) concerns(path string, containers []string) bool {
	return strings.HasPrefix(path, t.Dir+"/") || slices.ContainsFunc(containers, func(id string) bool { return strings.Contains(path, id) })
}

// files lists the files and cgroups of the testbed and the containers. A root
// file system, whether mounted or shared with a guest, counts as one.
func (t *Testbed) files(containers []string) ([]string, error) {
	var out []string
	roots := []string{
		filepath.Join(t.Dir, "run"), filepath.Join(t.Dir, "state"), filepath.Join(t.Dir, "tmp"), filepath.Join(t.Dir, "root/io.containerd.runtime.v2.task"),
		"/run/kata-containers", "/run/kata", "/run/vc", "/run/virtiofsd", "/run/netns", "/sys/fs/cgroup",
	}
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // not there, or gone meanwhile
			}
			if !t.concerns(path, containers) || entry.Name() == "cgroup.procs" {
				return nil
			}
			if strings.HasPrefix(path, "/sys/") && !entry.IsDir() {
				return nil
			}
			out = append(out, path)
			if entry.IsDir() && (entry.Name() == "rootfs" || entry.Name() == "passthrough") {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list files: %w", err)
		}
	}
	return out, nil
}

// links returns the targets of a directory's symbolic links.
func links(dir string) []string {
	found, _ := filepath.Glob(dir + "/*")
	var out []string
	for _, link := range found {
		if target, err := os.Readlink(link); err == nil {
			out = append(out, target)
		}
	}
	return out
}

// guestInventory prints what a guest contains: programs with their descriptors,
// the mounts of every mount namespace that a process is in, the files on those
// of them that are in memory, and cgroups. Kernel threads and the script itself
// are not listed.
//
//nolint:dupword // a shell script
const guestInventory = `
seen=
for p in /proc/[0-9]*; do
	case $p in /proc/$$ | /proc/$PPID) continue ;; esac
	read -r name 2>/dev/null <$p/comm || continue
	read -r stat 2>/dev/null <$p/stat || continue
	case $stat in *") Z "*) echo "zombie $name"; continue ;; esac
	[ -n "$(readlink $p/exe)" ] || continue
	echo "process $name: $(tr '\0\n' '  ' 2>/dev/null <$p/cmdline)"
	ls -l $p/fd 2>/dev/null | sed -n "s|.* -> |descriptor of $name: |p"
	ns=$(readlink $p/ns/mnt) || continue
	case $seen in *"$ns"*) continue ;; esac
	seen="$seen $ns"
	awk -v name="$name" '{ print "mount of " name ": " $5 " of " $4 }' $p/mountinfo
	awk '/ - (tmpfs|ramfs|rootfs) / { print $5 }' $p/mountinfo | sort -u | while read -r path; do
		root=$p/root$path
		find "${root%/}/" -xdev '(' -path $p/root/usr -o -path $p/root/lib ')' -prune -o ! -path "*$0" -print 2>/dev/null |
			sed "s|^$p/root|file of $name: |"
	done
done
find /sys/fs/cgroup -type d | sed 's|^|cgroup |'
`

// GuestInventory is [Testbed.Inventory] for the guest of a sandbox.
func (t *Testbed) GuestInventory(ctx context.Context, sandbox string, containers ...string) ([]string, error) {
	output, status, err := t.GuestExec(ctx, sandbox, guestInventory)
	if err != nil {
		return nil, err
	}
	if status != 0 {
		return nil, fmt.Errorf("inventory of %s: status %d: %s", sandbox, status, output)
	}
	var out []string
	for line := range strings.Lines(string(output)) {
		out = append(out, anonymous(strings.TrimSpace(line), containers))
	}
	slices.Sort(out)
	return out, nil
}

// numbers are what differs in every run: ids, digests, random names.
var numbers = regexp.MustCompile(`\b[0-9a-f]{8,}\b|[0-9]+`)

// anonymous removes numbers and the containers' names from an item.
func anonymous(item string, containers []string) string {
	byLength := slices.SortedFunc(slices.Values(containers), func(a, b string) int { return len(b) - len(a) })
	for _, id := range byLength {
		item = strings.ReplaceAll(item, id, "ID")
	}
	return numbers.ReplaceAllString(item, "#")
}

// More lists the items that occur more often in an inventory than in an earlier
// one.
func More(earlier, later []string) []string {
	count := map[string]int{}
	for _, item := range later {
		count[item]++
	}
	for _, item := range earlier {
		count[item]--
	}
	var out []string
	for item, n := range count {
		if n > 0 {
			out = append(out, fmt.Sprintf("%d × %s", n, item))
		}
	}
	slices.Sort(out)
	return out
}
