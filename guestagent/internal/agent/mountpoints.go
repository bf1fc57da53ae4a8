// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
)

// mountsMagic is the second number of an image with the mounts of a namespace.
const mountsMagic = 0x55563928

// readMounts reads the mounts of each mount namespace in an image set. The first
// list is that of init, whose namespace CRIU numbers first.
func readMounts(images string) (namespaces [][]*mnt.MntEntry, err error) {
	const prefix = "mountpoints-"
	paths, err := filepath.Glob(filepath.Join(images, prefix+"*.img"))
	if err != nil {
		return nil, err
	}
	number := func(path string) uint64 {
		n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), prefix), ".img"), 10, 32)
		return n
	}
	slices.SortFunc(paths, func(a, b string) int { return cmp.Compare(number(a), number(b)) })
	for _, path := range paths {
		image, err := readEntries(path)
		if err != nil {
			return nil, err
		}
		wrong := errcode.Damaged.Errorf("%s is not an image of CRIU", filepath.Base(path))
		if binary.LittleEndian.Uint32(image.magic[4:]) != mountsMagic {
			return nil, wrong
		}
		mounts := make([]*mnt.MntEntry, 0, len(image.entries))
		for _, data := range image.entries {
			m := &mnt.MntEntry{}
			if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(data, m); err != nil {
				return nil, wrong
			}
			mounts = append(mounts, m)
		}
		namespaces = append(namespaces, mounts)
	}
	return namespaces, nil
}

// mountPoints returns the mount points that CRIU has to find in the new
// container: those of mounts that it makes on the root file system or on an
// external mount. What is on another mount comes with that, and what is in
// /dev/shm is restored before.
func mountPoints(namespaces [][]*mnt.MntEntry) []string {
	var root *mnt.MntEntry // that of init
	points := make(map[string]bool)
	for _, mounts := range namespaces {
		byID := make(map[uint32]*mnt.MntEntry, len(mounts))
		for _, m := range mounts {
			byID[m.GetMntId()] = m
			if root == nil && m.GetMountpoint() == "/" {
				root = m
			}
		}
		for _, m := range mounts {
			parent := byID[m.GetParentMntId()]
			if parent == nil || isExternal(m) {
				continue
			}
			onRoot := parent.GetMountpoint() == "/" && parent.GetRootDev() == root.GetRootDev() && parent.GetRoot() == root.GetRoot()
			if onRoot || isExternal(parent) && parent.GetMountpoint() != inspect.ShmDir {
				points[m.GetMountpoint()] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(points))
}

func isExternal(m *mnt.MntEntry) bool { return m.GetExtMount() || m.GetExtKey() != "" }

// checkMountPoints refuses an image set with mounts that the processes had made
// where the new container has nothing to mount them on.
func checkMountPoints(images string, tree *inside.Tree) error {
	namespaces, err := readMounts(images)
	if err != nil {
		return err
	}
	var lost []string
	for _, point := range mountPoints(namespaces) {
		fd, err := tree.Open(point, unix.O_PATH)
		switch {
		case err == nil:
			unix.Close(fd)
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			lost = append(lost, point)
		}
	}
	if len(lost) > 0 {
		return errcode.NoMountPoint.Errorf("the container had mounted something at %s, which the new container lacks: restore it with the root file system of the checkpoint, or create it there", strings.Join(lost, ", "))
	}
	return nil
}
