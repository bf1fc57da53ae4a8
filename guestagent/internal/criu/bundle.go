// SPDX-License-Identifier: Apache-2.0

// Package criu runs CRIU in the guest over its RPC.
//
// It starts "PATH swrk FD" and talks to it over FD. PATH is the agent's own
// binary: in that mode ([Launch]) it reads the operation's [Job] from the
// directory that it was started from, joins namespaces, sets up mounts and
// inherited descriptors, and executes CRIU.
//
// The package relies on CRIU 4.2 (its options, file names and log) and Linux
// 6.18.
package criu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

const (
	// home is where the programs of the relocatable CRIU have to be: their ELF
	// interpreter is in its lib directory.
	home    = api.StateDir + "/criu"
	binary  = home + "/bin/criu"
	pathEnv = "PATH=" + home + "/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// programs is the directory of the copies in the guest's memory, a read-only
	// mount.
	programs = api.StateDir + "/bin"

	// Helper is the copy of the C program beside it (guestagent/helper).
	Helper = programs + "/kata-checkpoint-helper"
	// Launcher is the copy of the program that becomes CRIU (guestagent/launcher).
	Launcher = programs + "/kata-checkpoint-launcher"
)

// MinVersion is the oldest CRIU whose RPC supports image directories by name
// and a network lock by nftables, CRIU 4.0.
const MinVersion = 40000

// Load copies the CRIU of a guest bundle to where its programs have to be, and
// the helper and the launcher beside it. They are copied because virtiofs
// drops a file's pages from the guest's memory whenever the file is opened again
// (FOPEN_KEEP_CACHE is not set with cache=auto): from the share, each run of CRIU
// would read its 16 MiB again while the container is frozen.
func Load(bundle string) error {
	src := filepath.Join(bundle, "criu")
	if _, err := os.Stat(filepath.Join(src, "bin", "criu")); err != nil {
		return fmt.Errorf("the guest bundle has no CRIU: %w", err)
	}
	// What an earlier agent loaded, or a part of it, may be mounted still.
	if err := unix.Unmount(programs, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("load CRIU: unmount %s: %w", programs, err)
	}
	if err := errclass.Join(os.RemoveAll(home), os.RemoveAll(programs)); err != nil {
		return fmt.Errorf("load CRIU: %w", err)
	}
	if err := errclass.Join(os.CopyFS(home, os.DirFS(src)), copyProgram(bundle, Helper), copyProgram(bundle, Launcher)); err != nil {
		return fmt.Errorf("load CRIU: %w", err)
	}
	return sealPrograms()
}

// sealPrograms makes the mount of the programs read-only: what a process may
// open of another one's executable it cannot write to.
func sealPrograms() error {
	if err := unix.Mount(programs, programs, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", programs, err)
	}
	if err := unix.Mount("", programs, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", programs, err)
	}
	return nil
}

func copyProgram(bundle, to string) error {
	return copyExecutable(filepath.Join(bundle, "bin", filepath.Base(to)), to)
}

func copyExecutable(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errclass.Join(err, dst.Close())
}

// start serialises the start of processes: go-criu creates its socket pair
// without close-on-exec, and no other child may inherit it.
var start sync.Mutex

// Version asks CRIU for its version: major*10000 + minor*100 + sublevel.
func Version() (uint32, error) {
	if _, err := os.Stat(binary); err != nil {
		return 0, fmt.Errorf("no CRIU in the guest: %w", err)
	}
	s, err := startService(binary, "", false)
	if err != nil {
		return 0, err
	}
	resp, err := s.call(&rpc.CriuReq{Type: rpc.CriuReqType_VERSION.Enum()}, nil)
	if err = errclass.Join(err, s.close()); err != nil {
		return 0, fmt.Errorf("get the version of CRIU: %w", err)
	}
	v := resp.GetVersion()
	return uint32(v.GetMajorNumber()*10000 + v.GetMinorNumber()*100 + v.GetSublevel()), nil //nolint:gosec // version numbers
}

// Check runs `criu check`, which go-criu has no call for. The error contains
// what CRIU complained about.
func Check(ctx context.Context) error {
	out, err := Command(ctx, "criu", "check").CombinedOutput()
	if err != nil {
		return fmt.Errorf("criu check: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// TracksMemory reports whether the kernel notes which pages are written, without
// which there is no pre-dump (`criu check --feature`).
func TracksMemory(ctx context.Context) bool {
	return Command(ctx, "criu", "check", "--feature", "mem_dirty_track").Run() == nil
}

// Running lists the processes in the guest that run the loaded CRIU, as opposed
// to another file of that name. It only asks what is mapped: the executable of
// another process may be on a file system that does not answer.
func Running() []int {
	var own unix.Stat_t
	if err := unix.Stat(binary, &own); err != nil {
		return nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var out []int
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err == nil && procfs.Maps(pid, own.Dev, own.Ino) {
			out = append(out, pid)
		}
	}
	return out
}

// Command returns one of the bundle's programs: criu, tar or gzip. The caller
// starts it with [Start], or runs it to its end.
func Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(home, "bin", name), args...)
	cmd.Env = []string{pathEnv}
	return cmd
}

// Start starts a command that does not inherit go-criu's sockets.
func Start(cmd *exec.Cmd) error {
	start.Lock()
	defer start.Unlock()
	return cmd.Start()
}

// FormatVersion formats CRIU's version number, such as 40201, as 4.2.1.
func FormatVersion(v uint32) string {
	s := fmt.Sprintf("%d.%d", v/10000, v/100%100)
	if v%100 != 0 {
		s += fmt.Sprintf(".%d", v%100)
	}
	return strings.TrimSpace(s)
}
