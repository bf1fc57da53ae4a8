package inspect

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Shares are the devices of what the host shares with the guest.
func Shares(mounts []*mountinfo.Info) map[uint64]bool {
	out := make(map[uint64]bool)
	for _, m := range mounts {
		if m.FSType == "virtiofs" || m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.") {
			out[unix.Mkdev(uint32(m.Major), uint32(m.Minor))] = true //nolint:gosec // device numbers
		}
	}
	return out
}

// WrittenFiles lists the regular files on the devices that processes have open
// for writing or have mapped for all to see, each once, by links in /proc. Files
// without a name are left out.
func WrittenFiles(pids []int, devices map[uint64]bool) ([]string, error) {
	type inode struct{ device, number uint64 }
	seen := make(map[inode]bool)
	var out []string
	add := func(link string) {
		var st unix.Stat_t
		if err := unix.Stat(link, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink == 0 || !devices[st.Dev] {
			return // closed or ended meanwhile, or nothing of ours
		}
		if i := (inode{st.Dev, st.Ino}); !seen[i] {
			seen[i] = true
			out = append(out, link)
		}
	}
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			// A link's mode is that of the descriptor.
			if info, err := os.Lstat(fd); err == nil && info.Mode()&0o200 != 0 {
				add(fd)
			}
		}
		err = eachMapping(pid, func(m mapping) {
			if strings.HasSuffix(m.permissions, "s") { // whether or not it may be written to right now
				add(fmt.Sprintf("/proc/%d/map_files/%s", pid, mapFilesName(m.addresses)))
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// mapFilesName is the name in map_files of the addresses in maps, which are
// padded with zeros.
func mapFilesName(addresses string) string {
	var from, to uint64
	if _, err := fmt.Sscanf(addresses, "%x-%x", &from, &to); err != nil {
		return addresses
	}
	return fmt.Sprintf("%x-%x", from, to)
}
