// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	remap_file_path "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/lazyregexp"
)

// remapsImage has an entry for each open file that CRIU cannot open by its name.
const remapsImage = "remap-fpath.img"

// mendImages changes what CRIU has written where its restore would not bring
// back what was dumped:
//
//   - A periodic timerfd that has expired and was not read since has no time
//     left. CRIU takes that for a disarmed one, and it would never tick again.
//   - A file that has lost the name it was opened by, but not all of its names,
//     is opened by another of them. CRIU makes a link to it for the restore,
//     which would have to stay in the container's file system until then, and
//     removes it after every dump that leaves its processes alive, as all do. In
//     a tmpfs that is part of the image set the link is as well.
//   - A listening socket is bound to the name that its file has now.
//   - A connection that its peer outside has closed becomes a socket without one:
//     it cannot be restored at another address, and there is nobody to talk to.
//   - A connection whose keepalive was disabled for the dump has it enabled.
//
// Connections are those of the processes. InImages reports whether a path is in a
// file system that the image set contains.
func mendImages(images string, names inspect.Names, connections []inspect.Connection, keepAlive []netlock.Endpoints, inImages func(path string) bool) error {
	gone, err := linkRemaps(images)
	if err != nil {
		return err
	}
	found, lost := make(map[uint32]bool), ""
	err = editImage(filepath.Join(images, filesImage), func(f *fdinfo.FileEntry) bool {
		changed := false
		if t := f.GetTfd(); t != nil && t.GetTicks() > 0 && t.GetVsec()+t.GetVnsec() == 0 && t.GetIsec()+t.GetInsec() > 0 {
			t.Vnsec, changed = proto.Uint64(1), true
		}
		if r := f.GetReg(); gone[r.GetId()] && !inImages(r.GetName()) {
			if now := names.Files[r.GetName()]; now != "" {
				r.Name, changed = proto.String(now), true
				found[r.GetId()] = true
			} else {
				lost = r.GetName()
			}
		}
		if now := names.Sockets[f.GetUsk().GetIno()]; now != "" {
			f.Usk.Name, f.Usk.Deleted, changed = append([]byte(now), 0), nil, true
		}
		if enableKeepAlive(f.GetIsk(), keepAlive) {
			changed = true
		}
		if s := f.GetIsk(); s.GetProto() == unix.IPPROTO_TCP && s.GetState() == unix.BPF_TCP_CLOSE_WAIT && hasEnded(s, connections) {
			s.State, s.SrcPort, s.DstPort, changed = proto.Uint32(unix.BPF_TCP_CLOSE), proto.Uint32(0), proto.Uint32(0), true
		}
		return changed
	})
	if err != nil {
		return err
	}
	if lost != "" {
		return errcode.FileLost.Errorf("%s, which a process has open, was renamed or removed during the checkpoint: repeat it", lost)
	}
	return dropLinkRemaps(images, found)
}

// hasEnded reports whether a socket in an image is that of a connection that has
// ended.
func hasEnded(s *sk_inet.InetSkEntry, connections []inspect.Connection) bool {
	e, ok := endpointsOf(s)
	return ok && slices.ContainsFunc(connections, func(c inspect.Connection) bool {
		return c.Ended && c.Local == e.local && c.Remote == e.remote
	})
}

// linkRemapName matches the links that CRIU makes while it dumps
// (criu/files-reg.c, create_link_remap).
var linkRemapName = lazyregexp.New(`^link_remap\.[0-9]+$`)

// removeLinkRemaps removes the links that a CRIU has left which was killed in a
// dump: the next one would fail to make its own. Each is a further name of a file
// that has lost its first.
func removeLinkRemaps(look *inspect.Container) error {
	if len(look.Names.Files)+len(look.Names.Linked) == 0 {
		return nil
	}
	tree, err := look.Tree()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has exited
	}
	if err != nil {
		return err
	}
	defer tree.Close()
	for _, path := range look.Names.Files {
		if err := removeLinksBeside(tree, path); err != nil {
			return err
		}
	}
	for _, l := range look.Names.Linked {
		if err := removeLinksAbove(tree, l); err != nil {
			return err
		}
	}
	return nil
}

// removeLinksBeside removes the links of CRIU's to a file, which are in the same
// directory.
func removeLinksBeside(tree *inside.Tree, path string) error {
	fd, err := tree.Open(filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), filepath.Dir(path))
	defer dir.Close()
	var file unix.Stat_t
	if err := unix.Fstatat(fd, filepath.Base(path), &file, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return removeLinks(tree, dir, file.Dev, file.Ino)
}

// removeLinksAbove removes the links of CRIU's to a file whose own directory may
// be gone.
func removeLinksAbove(tree *inside.Tree, l inspect.Linked) error {
	for path := filepath.Dir(l.Path); ; path = filepath.Dir(path) {
		fd, err := tree.Open(path, unix.O_RDONLY|unix.O_DIRECTORY)
		if path != "/" && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)) {
			continue
		}
		if err != nil {
			return err
		}
		dir := os.NewFile(uintptr(fd), path)
		defer dir.Close()
		return removeLinks(tree, dir, l.Device, l.Inode)
	}
}

// removeLinks removes the links of CRIU's to one file from a directory.
func removeLinks(tree *inside.Tree, dir *os.File, device, inode uint64) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !linkRemapName.MatchString(name) || tree.IsMountPoint(filepath.Join(dir.Name(), name)) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || st.Dev != device || st.Ino != inode {
			continue
		}
		if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil {
			return &os.PathError{Op: "unlink", Path: filepath.Join(dir.Name(), name), Err: err}
		}
	}
	return nil
}

// linkRemaps lists the open files, by their ids, that CRIU has made links for.
func linkRemaps(images string) (map[uint32]bool, error) {
	ids := make(map[uint32]bool)
	err := editImage(filepath.Join(images, remapsImage), func(r *remap_file_path.RemapFilePathEntry) bool {
		if r.GetRemapType() == remap_file_path.RemapType_LINKED {
			ids[r.GetOrigId()] = true
		}
		return false
	})
	return ids, err
}

// dropLinkRemaps removes the links of files from an image set that are opened by
// other names.
func dropLinkRemaps(images string, files map[uint32]bool) error {
	if len(files) == 0 {
		return nil
	}
	path := filepath.Join(images, remapsImage)
	image, err := readEntries(path)
	if err != nil {
		return err
	}
	var kept [][]byte
	for _, e := range image.entries {
		r := &remap_file_path.RemapFilePathEntry{}
		if err := proto.Unmarshal(e, r); err != nil {
			return fmt.Errorf("read %s: %w", remapsImage, err)
		}
		if r.GetRemapType() != remap_file_path.RemapType_LINKED || !files[r.GetOrigId()] {
			kept = append(kept, e)
		}
	}
	image.entries = kept
	return image.write(path)
}

// editImage calls edit with each entry of an image, and writes those back that it
// reports to have changed. An image that does not exist has no entries.
func editImage[T any, M interface {
	*T
	proto.Message
}](path string, edit func(M) bool) error {
	image, err := readEntries(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	changed := false
	for i, data := range image.entries {
		entry := M(new(T))
		// Fields of a newer CRIU are kept, and may be required.
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(data, entry); err != nil {
			return fmt.Errorf("read %s: %w", filepath.Base(path), err)
		}
		if !edit(entry) {
			continue
		}
		changed = true
		if image.entries[i], err = (proto.MarshalOptions{AllowPartial: true}).Marshal(entry); err != nil {
			return fmt.Errorf("change %s: %w", filepath.Base(path), err)
		}
	}
	if !changed {
		return nil
	}
	return image.write(path)
}

// entriesImage is an image of CRIU's that consists of messages only.
type entriesImage struct {
	magic   []byte // two numbers
	entries [][]byte
}

func readEntries(path string) (*entriesImage, error) {
	data, err := readBounded(path, maxEntries)
	if err != nil {
		return nil, err
	}
	wrong := errcode.Damaged.Errorf("%s is not an image of CRIU", filepath.Base(path))
	if len(data) < 8 || binary.LittleEndian.Uint32(data) != imageMagic {
		return nil, wrong
	}
	image := &entriesImage{magic: data[:8]}
	for rest := data[8:]; len(rest) > 0; {
		if len(rest) < 4 {
			return nil, wrong
		}
		size := int64(binary.LittleEndian.Uint32(rest))
		if int64(len(rest)-4) < size {
			return nil, wrong
		}
		image.entries = append(image.entries, rest[4:4+size])
		rest = rest[4+size:]
	}
	return image, nil
}

// write writes an image in place of the one that is there, whose mode it keeps.
func (image *entriesImage) write(path string) error {
	mode := fs.FileMode(0o600)
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
	}
	out := append([]byte(nil), image.magic...)
	for _, e := range image.entries {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(e))) //nolint:gosec // far less
		out = append(out, e...)
	}
	next := path + ".new"
	err := os.WriteFile(next, out, 0o600)
	if err == nil {
		err = os.Chmod(next, mode) // whatever the umask
	}
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return errclass.Join(err, os.RemoveAll(next))
	}
	return nil
}
