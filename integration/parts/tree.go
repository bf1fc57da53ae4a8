package parts

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"sort"
	"strings"
)

// tree is a file system in memory, by clean paths without a leading slash. Files of an initrd and of an image's layer belong to root
// unless uid says otherwise; hard links become copies.
type tree map[string]node

type node struct {
	mode     fs.FileMode // type and permissions
	data     []byte
	link     string // target of a symbolic link
	uid, gid int
}

func (t tree) dir(mode fs.FileMode, paths ...string) {
	for _, p := range paths {
		t.add(p, node{mode: fs.ModeDir | mode})
	}
}

func (t tree) file(p string, mode fs.FileMode, data []byte) { t.add(p, node{mode: mode, data: data}) }

func (t tree) symlink(p, target string) { t.add(p, node{mode: fs.ModeSymlink | 0o777, link: target}) }

func (t tree) add(p string, n node) {
	p = strings.TrimPrefix(path.Clean("/"+p), "/")
	if p == "" {
		return
	}
	if parent := path.Dir(p); parent != "." {
		if _, ok := t[parent]; !ok {
			t.dir(0o755, parent)
		}
	}
	t[p] = n
}

// copyFile takes a file of the host, wherever symbolic links lead.
func (t tree) copyFile(p, host string) error {
	info, err := os.Stat(host)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(host)
	if err != nil {
		return err
	}
	t.file(p, info.Mode().Perm(), data)
	return nil
}

// paths in an order in which parents come first.
func (t tree) paths() []string {
	out := make([]string, 0, len(t))
	for p := range t {
		out = append(out, p)
	}
	sort.Strings(out)
	return out
}

// unpack adds a Debian package's files. Debian's packages may still name /bin and /lib: they go below /usr, where the links of the
// tree's owner lead. Those links themselves, and files that keep refuses, stay out.
func (t tree) unpack(ctx context.Context, deb string, keep func(path string) bool) error {
	cmd := exec.CommandContext(ctx, "dpkg", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("unpack %s: %w", path.Base(deb), err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack %s: %w", path.Base(deb), err)
	}
	readErr := t.unpackTar(tar.NewReader(out), keep)
	_, _ = io.Copy(io.Discard, out) // let dpkg end
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", path.Base(deb), err, stderr.Bytes())
	}
	return nil
}

func (t tree) unpackTar(r *tar.Reader, keep func(path string) bool) error {
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		p := mergeUsr(h.Name)
		if p == "" || path.Dir(p) == "usr" && h.Typeflag == tar.TypeSymlink || !keep(p) {
			continue
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if _, ok := t[p]; !ok {
				t.dir(fs.FileMode(h.Mode).Perm(), p)
			}
		case tar.TypeSymlink:
			t.symlink(p, h.Linkname)
		case tar.TypeLink:
			if n, ok := t[mergeUsr(h.Linkname)]; ok {
				t.add(p, n)
			}
		case tar.TypeReg:
			data, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			t.file(p, fs.FileMode(h.Mode).Perm(), data)
		}
	}
}

func mergeUsr(name string) string {
	p := strings.TrimPrefix(path.Clean("/"+name), "/")
	first, _, _ := strings.Cut(p, "/")
	switch first {
	case "bin", "sbin", "lib", "lib64":
		return "usr/" + p
	}
	return p
}

// writeCPIO writes the tree in the format of an initrd. The kernel unpacks archives that follow each other, one over the other.
func (t tree) writeCPIO(w io.Writer) error {
	for i, p := range t.paths() {
		n := t[p]
		data := n.data
		var kind uint32
		switch {
		case n.mode.IsDir():
			kind = 0o040000
		case n.mode&fs.ModeSymlink != 0:
			kind, data = 0o120000, []byte(n.link)
		default:
			kind = 0o100000
		}
		if err := writeCPIOEntry(w, p, uint32(i+1), kind|uint32(n.mode.Perm())|sticky(n.mode), data); err != nil {
			return err
		}
	}
	return writeCPIOEntry(w, "TRAILER!!!", 0, 0, nil)
}

func sticky(m fs.FileMode) uint32 {
	if m&fs.ModeSticky != 0 {
		return 0o1000
	}
	return 0
}

// writeCPIOEntry writes one entry of a "newc" archive: 13 numbers of 8 hexadecimal digits, the name, the data, each padded to 4 bytes.
func writeCPIOEntry(w io.Writer, name string, inode, mode uint32, data []byte) error {
	const headerSize = 110
	fields := []uint32{inode, mode, 0, 0, 1, 0, uint32(len(data)), 0, 0, 0, 0, uint32(len(name) + 1), 0}
	var b bytes.Buffer
	b.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(&b, "%08X", f)
	}
	b.WriteString(name)
	b.WriteByte(0)
	b.Write(padding(headerSize + len(name) + 1))
	b.Write(data)
	b.Write(padding(len(data)))
	_, err := w.Write(b.Bytes())
	return err
}

func padding(n int) []byte { return make([]byte, (4-n%4)%4) }

// writeTar writes the tree as an image's layer, the same bytes every time.
func (t tree) writeTar(w io.Writer) error {
	out := tar.NewWriter(w)
	for _, p := range t.paths() {
		n := t[p]
		h := &tar.Header{Name: p, Mode: int64(n.mode.Perm()) | int64(sticky(n.mode)), Uid: n.uid, Gid: n.gid, Format: tar.FormatUSTAR}
		switch {
		case n.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, p+"/"
		case n.mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Linkname = tar.TypeSymlink, n.link
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(n.data))
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := out.Write(n.data); h.Typeflag == tar.TypeReg && err != nil {
			return err
		}
	}
	return out.Close()
}
