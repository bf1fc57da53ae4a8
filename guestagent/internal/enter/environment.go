package enter

import (
	"bytes"
	"errors"
	"fmt"
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
	data, err := passwd(target)
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

// maxPasswd is how much of a passwd file is looked at.
const maxPasswd = 1 << 20

// passwd reads the file in few calls, each of which an emulated guest feels.
func passwd(target int) ([]byte, error) {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", target), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	// What the container has there may be no file at all: an open must not wait.
	fd, err := unix.Openat2(root, "etc/passwd", &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, unix.EINVAL
	}
	// Read to its size, not to its end: that would be one read more.
	data := make([]byte, min(st.Size, maxPasswd))
	for at := 0; at < len(data); {
		n, err := unix.Pread(fd, data[at:], int64(at))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		if n == 0 {
			return data[:at], nil
		}
		at += max(n, 0)
	}
	return data, nil
}
