// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"regexp"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/lazyregexp"
)

// Names of files in an image set; all others are CRIU's.
const (
	// ManifestName is written last.
	ManifestName = "kata-checkpoint.json"
	// SignatureName is the signature of the manifest, see package signing. It is
	// not in the manifest's list of files.
	SignatureName = ManifestName + ".sig"
	// DevShmName is the content of /dev/shm.
	DevShmName = "dev-shm.tar"
	// InventoryName is CRIU's: without it CRIU restores nothing.
	InventoryName = "inventory.img"
	// DumpLogName and StatsName are CRIU's log and statistics of the dump,
	// which engines look for beside the image set.
	DumpLogName = "dump.log"
	StatsName   = "stats-dump"
)

// Names in a checkpoint archive of the CRI, and in the directory into which it
// is unpacked (containerd 2.4,
// internal/cri/server/container_checkpoint_linux.go).
const (
	// ArchiveImages is the directory with the image set.
	ArchiveImages = "checkpoint"
	// RootfsDiffName, beside that directory, is a tar of the changes of the root
	// file system.
	RootfsDiffName = "rootfs-diff.tar"
)

// imageNames matches the images that CRIU 4.2 writes of a container in a guest
// (criu/image-desc.c). %u stands for a decimal number, %x for a hexadecimal one.
//
// CRIU reads more than it writes, and restores with the guest's authority what
// it finds: credentials in the format of its early versions (creds-%u), user,
// network and UTS namespaces (userns-%u, netns-%u, utsns-%u and more) that no
// container in a guest has of its own, AppArmor policies, binfmt_misc handlers.
// What a later CRIU adds is added here with a new [FormatVersion], so that
// earlier releases name the version in place of the file.
var imageNames = matchNames(
	"inventory", "pstree", "files", "cgroup", "seccomp", "remap-fpath", "filelocks", "memfd",
	"pipes-data", "fifo-data", "sk-queues", "tty-info", "tty-data", "bpfmap-file", "bpfmap-data",
	"core-%u", "ids-%u", "mm-%u", "fs-%u", "fdinfo-%u",
	"pagemap-%u", "pagemap-shmem-%u", "pages-%u",
	"mountpoints-%u", "tmpfs-dev-%u.tar.gz", "timens-%u", "pidns-%u",
	"ipcns-var-%u", "ipcns-shm-%u", "ipcns-msg-%u", "ipcns-sem-%u",
	"ghost-file-%x", "tcp-stream-%x",
)

func matchNames(formats ...string) *lazyregexp.Regexp {
	for i, f := range formats {
		f = regexp.QuoteMeta(f)
		f = strings.ReplaceAll(f, "%u", "(0|[1-9][0-9]{0,19})")
		formats[i] = strings.ReplaceAll(f, "%x", "(0|[1-9a-f][0-9a-f]{0,15})")
	}
	return lazyregexp.New(`^(` + strings.Join(formats, "|") + `)\.img$`)
}

// isOurs reports whether a file is written by Commit.
func isOurs(name string) bool { return name == ManifestName || name == SignatureName }

// IsImage reports whether a file may be in an image set besides the manifest: an
// image of CRIU that a container can have, or the content of /dev/shm.
func IsImage(name string) bool { return name == DevShmName || imageNames.MatchString(name) }
