// Package criu runs CRIU in the guest by its RPC, through go-criu.
//
// go-criu starts "PATH swrk FD" and talks to it over FD. PATH is the agent's
// own binary: in that mode ([Launch]) it reads the operation's [Job] from the
// directory that it was started from, moves into the namespaces, lays out
// mounts and inherited descriptors, and becomes CRIU.
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

	gocriu "github.com/checkpoint-restore/go-criu/v7"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

const (
	// home is where the relocatable CRIU's programs expect themselves: their
	// ELF interpreter lies in its lib directory.
	home    = api.StateDir + "/criu"
	binary  = home + "/bin/criu"
	pathEnv = "PATH=" + home + "/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// Agent is the copy in the guest's memory of the agent's own binary.
	Agent = api.StateDir + "/" + api.AgentBinary
)

// MinVersion is the oldest CRIU whose RPC has what is used here: image
// directories by name, and NETWORK_LOCK by nftables (CRIU 4.0).
const MinVersion = 40000

// Load copies the CRIU of a guest bundle to where its programs expect
// themselves, and the agent's binary beside it. Copies, because virtiofs drops
// a file's pages from the guest's memory whenever it is opened again
// (FOPEN_KEEP_CACHE is not set with cache=auto): started from the share, each
// run of CRIU would read its 16 MiB anew, while the container is frozen.
func Load(bundle string) error {
	src := filepath.Join(bundle, "criu")
	if _, err := os.Stat(filepath.Join(src, "bin", "criu")); err != nil {
		return fmt.Errorf("the guest bundle has no CRIU: %w", err)
	}
	// An agent that was killed half way leaves a part; nothing runs from it.
	if err := errors.Join(os.RemoveAll(home), os.RemoveAll(filepath.Dir(Agent))); err != nil {
		return fmt.Errorf("load CRIU: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("load CRIU: %w", err)
	}
	if err := errors.Join(os.CopyFS(home, os.DirFS(src)), copyExecutable(self, Agent)); err != nil {
		return fmt.Errorf("load CRIU: %w", err)
	}
	return nil
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
	return errors.Join(err, dst.Close())
}

// start guards the start of processes: go-criu makes its socket pair without
// close-on-exec, and no other child may inherit it.
var start sync.Mutex

// Version asks CRIU for its version: major*10000 + minor*100 + sublevel.
func Version() (uint32, error) {
	if _, err := os.Stat(binary); err != nil {
		return 0, fmt.Errorf("no CRIU in the guest: %w", err)
	}
	c := gocriu.MakeCriu()
	c.SetCriuPath(binary)
	if err := prepare(c); err != nil {
		return 0, err
	}
	v, err := c.GetCriuVersion()
	if err = errors.Join(err, c.Cleanup()); err != nil {
		return 0, fmt.Errorf("ask CRIU for its version: %w", err)
	}
	return uint32(v), nil //nolint:gosec // a version number
}

// Check runs `criu check`, which go-criu has no call for. The error carries
// what CRIU found amiss.
func Check(ctx context.Context) error {
	out, err := Command(ctx, "criu", "check").CombinedOutput()
	if err != nil {
		return fmt.Errorf("criu check: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Running lists the processes in the guest that are the loaded CRIU. What a
// container calls by its name is another file.
func Running() []int {
	own, err := os.Stat(binary)
	if err != nil {
		return nil
	}
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	var out []int
	for _, link := range links {
		if exe, err := os.Stat(link); err != nil || !os.SameFile(exe, own) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

// Command is one of the programs of the bundle: criu, tar or gzip. The
// caller starts it with [Start] or waits for it whole.
func Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(home, "bin", name), args...)
	cmd.Env = []string{pathEnv}
	return cmd
}

// Start starts a command without the descriptors of a CRIU that is being started.
func Start(cmd *exec.Cmd) error {
	start.Lock()
	defer start.Unlock()
	return cmd.Start()
}

func prepare(c *gocriu.Criu) error {
	start.Lock()
	defer start.Unlock()
	if err := c.Prepare(); err != nil {
		return fmt.Errorf("start CRIU: %w", err)
	}
	return nil
}

// FormatVersion turns CRIU's number into what people write.
func FormatVersion(v uint32) string {
	s := fmt.Sprintf("%d.%d", v/10000, v/100%100)
	if v%100 != 0 {
		s += fmt.Sprintf(".%d", v%100)
	}
	return strings.TrimSpace(s)
}
