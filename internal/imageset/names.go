// SPDX-License-Identifier: Apache-2.0

package imageset

// Names of files in an image set; all others are CRIU's.
const (
	// ManifestName is written last.
	ManifestName = "kata-checkpoint.json"
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
