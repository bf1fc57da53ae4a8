// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// plenty is the free space below which a warning is due, in bytes: a container
// of 512 MiB, twice, as its images are copied.
const plenty = 1 << 30

// bundle looks at the guest bundle.
func (h *Host) bundle(ctx context.Context, f *Findings) {
	const check = "bundle"
	dir := h.Config.GuestBundle
	cure := "kata-checkpoint install of this release, or put its guest bundle at " + dir + ", or set guest_bundle in config.toml"
	for _, name := range []string{
		"bin/kata-checkpoint-agent", "bin/kata-checkpoint-helper", "bin/kata-checkpoint-launcher", "bin/criu",
		"hooks/prestart/kata-checkpoint-agent-hook", "criu/bin/criu", "criu/bin/tar", "criu/bin/gzip",
	} {
		path := filepath.Join(dir, name)
		st, err := os.Lstat(path)
		switch {
		case err != nil:
			f.fail(check, cure, "the guest bundle is not whole: %v", err)
			return
		case !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
			// kata-agent runs no hook that is a symbolic link.
			f.fail(check, cure, "the guest bundle is damaged: %s is not an executable file", path)
			return
		}
	}
	if st, err := os.Stat(dir); err == nil && st.Mode()&0o022 != 0 {
		f.fail(check, "chmod go-w "+dir, "%s can be changed by users other than its owner: what is in it runs as root in every guest", dir)
		return
	}
	out, err := output(ctx, filepath.Join(dir, "bin/kata-checkpoint-agent"), "--version")
	if err != nil {
		f.fail(check, cure, "the agent does not run: %v", err)
		return
	}
	if want := "kata-checkpoint-agent " + version.Version; firstLine(out) != want {
		f.warn(check, cure, "the guest bundle is %s, this is %s: adjacent minor releases work together, others may not", firstLine(out), version.Version)
	} else {
		f.ok(check, "%s, %s", dir, firstLine(out))
	}
	port, err := agentPort(dir)
	switch {
	case err != nil:
		f.fail("bundle.port", cure, "agent.json in the guest bundle: %v", err)
	case port != h.Config.AgentPort:
		f.fail("bundle.port", fmt.Sprintf("set agent_port = %d in config.toml, or {\"vsock_port\": %d} in %s", port, h.Config.AgentPort, filepath.Join(dir, "agent.json")),
			"the agent listens on port %d, and the shim dials port %d", port, h.Config.AgentPort)
	}
}

func agentPort(bundle string) (uint32, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "agent.json"))
	if err != nil {
		return 0, err
	}
	var settings struct {
		Port uint32 `json:"vsock_port"`
	}
	return settings.Port, json.Unmarshal(data, &settings)
}

// stateDir looks at where images are transferred.
func (h *Host) stateDir(f *Findings) {
	const check = "state_dir"
	dir := h.Config.StateDir
	// The shim creates it: what exists of its path decides.
	at := dir
	for {
		st, err := os.Stat(at)
		if err == nil && st.IsDir() {
			break
		}
		if err == nil {
			err = unix.ENOTDIR
		}
		if !errors.Is(err, fs.ErrNotExist) || at == "/" {
			f.fail(check, "set state_dir in config.toml to a directory on a disk", "%s cannot be a directory: %s: %v", dir, at, err)
			return
		}
		at = filepath.Dir(at)
	}
	if st, err := os.Stat(dir); err == nil && st.Mode()&0o066 != 0 {
		f.warn(check, "chmod 700 "+dir, "%s can be read by others: it holds the memory of containers", dir)
	}
	st, err := h.space(at)
	if err != nil {
		f.fail(check, "set state_dir in config.toml to a directory on a disk", "%s: %v", at, err)
		return
	}
	if st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC {
		f.warn(check, "set state_dir in config.toml to a directory on a disk", "%s is in memory: each checkpoint takes the container's memory a second time", dir)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		f.fail(check, "set state_dir in config.toml to a directory that can be written", "%s is read-only", dir)
		return
	}
	free := st.Bavail * uint64(st.Bsize) //nolint:gosec // a block's size
	if free < plenty {
		f.warn(check+".space", "make room, or set state_dir in config.toml to a larger file system", "%s has %d MiB left: a checkpoint needs the container's memory twice", at, free>>20)
	} else {
		f.ok(check+".space", "%s has %d MiB left", at, free>>20)
	}
	if reflinks(at) {
		f.ok(check+".reflink", "%s has reflinks: what is copied takes no room", at)
	} else {
		f.ok(check+".reflink", "%s has no reflinks (XFS and Btrfs do): images are copied", at)
	}
}

// reflinks tries to clone a file in the directory.
func reflinks(dir string) bool {
	from, err := os.CreateTemp(dir, ".reflink-")
	if err != nil {
		return false
	}
	defer from.Close()
	defer os.Remove(from.Name())
	to, err := os.CreateTemp(dir, ".reflink-")
	if err != nil {
		return false
	}
	defer to.Close()
	defer os.Remove(to.Name())
	if _, err := from.Write(make([]byte, os.Getpagesize())); err != nil {
		return false
	}
	return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) == nil
}

// room looks whether state_dir has room for the images of a container.
func (h *Host) room(bytes uint64, f *Findings) {
	at := h.Config.StateDir
	st, err := h.space(at)
	if err != nil {
		return // the shim makes it
	}
	free := st.Bavail * uint64(st.Bsize) //nolint:gosec // a block's size
	reserve := uint64(max(0, h.Config.ReserveBytes))
	if whole := st.Blocks * uint64(st.Bsize); whole < 20*reserve { //nolint:gosec // likewise
		reserve = whole / 20
	}
	if free < bytes+reserve {
		f.fail("container.space", "make room, or set state_dir in config.toml to a larger file system", "%s has %d MiB left, of which %d MiB stay free (reserve_bytes)", at, free>>20, reserve>>20)
	}
}
