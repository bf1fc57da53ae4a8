// SPDX-License-Identifier: Apache-2.0

package enter

import (
	"bytes"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
)

// candidates are the paths to try for a command, as execvp(3) would.
func candidates(name string, env []string) []string {
	if strings.Contains(name, "/") {
		return []string{name}
	}
	search := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	var out []string
	for dir := range strings.SplitSeq(search, ":") {
		if dir == "" {
			dir = "."
		}
		out = append(out, dir+"/"+name)
	}
	return out
}

// environment adds HOME where the caller set none, as Kata's agent does, from
// the passwd file of the container, which is looked up without leaving it.
func environment(target int, process *specs.Process) []string {
	for _, e := range process.Env {
		if strings.HasPrefix(e, "HOME=") {
			return process.Env
		}
	}
	return append(append([]string(nil), process.Env...), "HOME="+home(target, process.User.UID))
}

func home(target int, uid uint32) string {
	data, err := passwd(target)
	if err != nil {
		return "/"
	}
	return homeIn(data, uid)
}

// homeIn returns the home of a user in a passwd file, in which there may be
// anything.
func homeIn(passwd []byte, uid uint32) string {
	for line := range bytes.Lines(passwd) {
		fields := strings.Split(strings.TrimSpace(string(line)), ":")
		if len(fields) >= 6 && fields[2] == strconv.FormatUint(uint64(uid), 10) && path.IsAbs(fields[5]) && strings.IndexByte(fields[5], 0) < 0 {
			return fields[5]
		}
	}
	return "/"
}

// maxPasswd is how much of a passwd file is looked at.
const maxPasswd = 1 << 20

// passwd reads the container's file, whatever the container has put there.
func passwd(target int) ([]byte, error) {
	tree, err := inside.OpenRoot(target, func(m *mountinfo.Info) bool { return inside.KindOf(m) != inside.Other })
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	f, err := tree.OpenRegular("/etc/passwd")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxPasswd))
}
