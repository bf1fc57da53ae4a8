// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"

	"google.golang.org/protobuf/proto"
)

// Magic numbers at the beginning of CRIU's images (criu/include/magic.h).
const (
	imageMagic = 0x54564319
	coreMagic  = 0x55053847
)

// readCore reads the image of a process or thread: two magic numbers, a size
// and one protobuf message.
func readCore(path string) (*criu_core.CoreEntry, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	const head = 12
	wrong := fmt.Errorf("%s is not an image of CRIU", filepath.Base(path))
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
		return nil, errors.Join(wrong, err)
	}
	return core, nil
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
