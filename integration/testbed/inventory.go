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

// Inventory lists what there is on the machine of the testbed and of the containers that are named, an item a line, in words: processes, their
// descriptors, mounts in all of their mount namespaces, cgroups, listening sockets, and files outside of containerd's own store. Numbers and
// the containers' names are left out of the items, so that two inventories of what is alike but for them have the same items, each as many times.
//
// containerd's descriptors are not listed: it opens files when it first needs them, and keeps some.
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
			continue // it has ended
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
			continue // of a process that has ended
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

// concerns tells whether a path is of the testbed or of one of the containers.
func (t *Testbed) concerns(path string, containers []string) bool {
	return strings.HasPrefix(path, t.Dir+"/") || slices.ContainsFunc(containers, func(id string) bool { return strings.Contains(path, id) })
}

// files lists the files and cgroups that concern the testbed and the containers. A root file system, be it mounted or shared with a guest,
// counts as one.
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

// links gives the targets of a directory's links.
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

// guestInventory prints what there is in a guest: programs, the descriptors of each, the mounts of every mount namespace that a process is in,
// the files in what of these is kept in memory, and cgroups. Neither the kernel's threads nor the script itself are listed.
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

// GuestInventory lists what there is in the guest of a sandbox, as [Testbed.Inventory] does for the machine.
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

// numbers are what is another in every run: ids, digests, random names.
var numbers = regexp.MustCompile(`\b[0-9a-f]{8,}\b|[0-9]+`)

// anonymous takes numbers and the containers' names out of an item.
func anonymous(item string, containers []string) string {
	byLength := slices.SortedFunc(slices.Values(containers), func(a, b string) int { return len(b) - len(a) })
	for _, id := range byLength {
		item = strings.ReplaceAll(item, id, "ID")
	}
	return numbers.ReplaceAllString(item, "#")
}

// More lists the items of which there are more in an inventory than in an earlier one.
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
