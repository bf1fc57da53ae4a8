// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Magic numbers at the beginning of CRIU's images (criu/include/magic.h).
const (
	imageMagic  = 0x54564319
	coreMagic   = 0x55053847
	pstreeMagic = 0x50273030
)

const (
	// maxCore bounds the image of a thread, in bytes. It is largest where many
	// signals are queued.
	maxCore = 16 << 20
	// maxEntries bounds an image with an entry for each file or process, in bytes.
	maxEntries = 64 << 20
)

// readBounded reads an image of at most limit bytes whole.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, errcode.Damaged.Errorf("%s is larger than %d bytes", filepath.Base(path), limit)
	}
	return data, nil
}

// readCore reads the image of a process or thread: two magic numbers, a size
// and one protobuf message.
func readCore(path string) (*criu_core.CoreEntry, error) {
	data, err := readBounded(path, maxCore)
	if err != nil {
		return nil, err
	}
	const head = 12
	wrong := errcode.Damaged.Errorf("%s is not an image of CRIU", filepath.Base(path))
	if len(data) < head || binary.LittleEndian.Uint32(data) != imageMagic || binary.LittleEndian.Uint32(data[4:]) != coreMagic {
		return nil, wrong
	}
	size := binary.LittleEndian.Uint32(data[8:])
	if int64(size) > int64(len(data)-head) {
		return nil, wrong
	}
	core := &criu_core.CoreEntry{}
	// Fields that a newer CRIU requires do not matter here.
	if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(data[head:head+size], core); err != nil {
		return nil, errclass.Join(wrong, err)
	}
	return core, nil
}

// readTree reads the processes of an image set, each with its threads.
func readTree(images string) (tree []*pstree.PstreeEntry, err error) {
	path := filepath.Join(images, "pstree.img")
	image, err := readEntries(path)
	if err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint32(image.magic[4:]) != pstreeMagic {
		return nil, errcode.Damaged.Wrap(errors.New("pstree.img is not an image of CRIU"))
	}
	for _, data := range image.entries {
		entry := &pstree.PstreeEntry{}
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(data, entry); err != nil {
			return nil, errcode.Damaged.Errorf("pstree.img is not an image of CRIU: %w", err)
		}
		tree = append(tree, entry)
	}
	return tree, nil
}

// sharedNamespace reports whether the processes of an image set shared their
// pod's PID namespace: only for an external one does CRIU write this image.
func sharedNamespace(images string) (bool, error) {
	found, err := filepath.Glob(filepath.Join(images, "pidns-*.img"))
	return len(found) > 0, err
}

// imagePIDs lists the PIDs of the processes and threads in an image set, each
// of which has an image named after it.
func imagePIDs(images string) ([]int, error) {
	found, err := filepath.Glob(filepath.Join(images, "core-*.img"))
	var pids []int
	for _, path := range found {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "core-"), ".img")
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, err
}
