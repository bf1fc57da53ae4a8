package enter

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
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
	for _, dir := range strings.Split(search, ":") {
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
	root, err := os.OpenRoot(fmt.Sprintf("/proc/%d/root", target))
	if err != nil {
		return "/"
	}
	defer root.Close()
	// What the container has there may be no file at all: an open must not wait.
	f, err := root.OpenFile("etc/passwd", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "/"
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "/"
	}
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return "/"
	}
	for line := range bytes.Lines(data) {
		fields := strings.Split(strings.TrimSpace(string(line)), ":")
		if len(fields) >= 6 && fields[2] == strconv.FormatUint(uint64(uid), 10) && path.IsAbs(fields[5]) {
			return fields[5]
		}
	}
	return "/"
}
