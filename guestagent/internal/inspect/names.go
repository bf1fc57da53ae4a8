// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// Names are the names in the file system that have changed since processes
// opened or bound them: CRIU looks for a file by its old name.
type Names struct {
	// Files maps the name that /proc has for an open file, without its mark of a
	// deleted one, to another name of the same file.
	Files map[string]string
	// Sockets maps the inode of a bound unix socket to the name that its file has
	// now.
	Sockets map[uint32]string
	// Linked are those files to which CRIU makes a link for the restore.
	Linked []Linked
}

// Linked is an open file that has names, but not its own any more.
type Linked struct {
	// Path is the name by which it was opened. CRIU's link is in the same
	// directory, or in the nearest one above it that exists.
	Path          string
	Device, Inode uint64
}

// maxSearched bounds the directory entries that are compared with one file.
const maxSearched = 10000

// CheckNames looks for open files and bound sockets that have lost the name by
// which CRIU looks for them, and notes other names of theirs in the same
// directory. Its findings are those that a restore could not bring back, and
// devices that CRIU cannot open. Marked are the destinations of mounts that the
// caller keeps out of the image set.
func (c *Container) CheckNames(ctx context.Context, marked []string) ([]Finding, error) {
	tree, err := c.Tree()
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	s := nameSearch{c: c, tree: tree, there: make(map[string]inode), names: Names{Files: make(map[string]string), Sockets: make(map[uint32]string)}}
	if s.inImages, err = c.imageDevices(marked); err != nil {
		return nil, err
	}
	seen := make(map[Mapping]bool)
	fine := make(map[File]bool)
	for _, p := range c.Processes {
		// What names mean in a mount namespace below the container's, CRIU knows.
		if p.mountNamespace != c.Root.mountNamespace {
			continue
		}
		for _, f := range p.Files {
			// CRIU has its own way with files that the kernel generates.
			m := c.mounts.mountOf(f)
			if !c.mounts.answers(m) || generatedFS[m.FSType] || !c.mounts.inInit(m) {
				continue
			}
			if err := ended(ctx); err != nil {
				return nil, err
			}
			// Processes have many files from their parents.
			key := File{Name: f.Name, MountID: f.MountID, Inode: f.Inode}
			if fine[key] {
				continue
			}
			if fine[key], err = s.file(p, f.Name, fmt.Sprintf("/proc/%d/fd/%d", p.PID, f.FD), m); err != nil {
				return nil, err
			}
		}
		if p.workDir != "/" {
			key := File{Name: p.workDir, MountID: mountOfLink(p, "cwd")}
			if m := c.mounts.ids[key.MountID]; !fine[key] && c.mounts.answers(m) && !generatedFS[m.FSType] && c.mounts.inInit(m) {
				if fine[key], err = s.file(p, p.workDir, fmt.Sprintf("/proc/%d/cwd", p.PID), m); err != nil {
					return nil, err
				}
			}
		}
		for _, m := range p.Mappings {
			// All processes have the same libraries.
			key := Mapping{Path: m.Path, Device: m.Device, Inode: m.Inode}
			if seen[key] || !c.mounts.answers(c.mounts.deviceOf(m)) {
				continue
			}
			seen[key] = true
			if err := ended(ctx); err != nil {
				return nil, err
			}
			if _, err := s.file(p, m.Path, fmt.Sprintf("/proc/%d/map_files/%s", p.PID, m.Addresses), nil); err != nil {
				return nil, err
			}
		}
	}
	for number, o := range c.sockets.owners {
		if o.process.Exec {
			continue
		}
		if err := ended(ctx); err != nil {
			return nil, err
		}
		if err := s.socket(number, o); err != nil {
			return nil, err
		}
	}
	c.Names = s.names
	return s.findings, nil
}

// inode identifies a file.
type inode struct{ device, number uint64 }

type nameSearch struct {
	c    *Container
	tree *inside.Tree
	// there has the files that were found by name, none for what is gone.
	there map[string]inode
	// inImages are the devices of the file systems that the image set contains.
	inImages map[uint64]bool
	names    Names
	findings []Finding
}

func (s *nameSearch) refuse(p *Process, code errcode.Code, advice, format string, args ...any) {
	s.findings = append(s.findings, s.c.finding(p, rule{Refused, code, fmt.Sprintf(format, args...), advice}))
}

// stays reports whether a file that did not have its name a moment ago still
// does not: a program that runs may have renamed or closed it meanwhile, as
// those do that replace a file by writing another one.
func (s *nameSearch) stays(link, name string, own inode) bool {
	delete(s.there, name)
	there, err := s.lookUp(name)
	if err != nil || there == own {
		return false
	}
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil || st.Nlink == 0 || (inode{st.Dev, st.Ino}) != own {
		return false
	}
	now, err := os.Readlink(link)
	return err == nil && strings.TrimSuffix(now, deletedSuffix) == name
}

// reopen is the advice for a file that has lost its name.
const reopen = "have it reopen the file before the checkpoint, or restart it"

// GhostLimit is the size in bytes of the largest unlinked file that an image set
// may contain. CRIU's default, 1 MiB, is too small for many databases.
const GhostLimit = 1 << 30

// blockSize is the unit of st_blocks.
const blockSize = 512

func readOnly(m *mountinfo.Info) bool {
	return slices.Contains(strings.Split(m.Options, ","), "ro")
}

// file looks at an open or mapped file. The mount is known for open ones. It
// reports whether the file is fine, whoever has it open.
func (s *nameSearch) file(p *Process, name, link string, mount *mountinfo.Info) (fine bool, _ error) {
	if !strings.HasPrefix(name, "/") {
		return true, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return false, nil //nolint:nilerr // closed, unmapped or exited meanwhile
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		if mount == nil && st.Rdev != unix.Mkdev(memoryMajor, zeroMinor) {
			s.refuse(p, errcode.Device, "unmap it before the checkpoint, or run the program without it", "has the device %s mapped, which CRIU cannot checkpoint", name)
			return false, nil
		}
		if mount != nil && !restorableDevice(&st) {
			s.refuse(p, errcode.Device, "close it before the checkpoint, or run the program without it", "has the device %s open, which CRIU cannot checkpoint", name)
			return false, nil
		}
		// CRIU opens memory devices as it does files.
		if mount == nil || unix.Major(st.Rdev) != memoryMajor {
			return true, nil
		}
	case unix.S_IFDIR:
		return s.directory(p, name, link, &st)
	case unix.S_IFREG, unix.S_IFIFO:
	default:
		return true, nil
	}
	own := inode{st.Dev, st.Ino}
	saved := s.inImages[st.Dev]
	if name, deleted := strings.CutSuffix(name, deletedSuffix); deleted {
		if there, err := s.lookUp(name + deletedSuffix); err != nil || there == own {
			return false, nil //nolint:nilerr // that is its name, or CRIU reports the error
		}
	}
	name = strings.TrimSuffix(name, deletedSuffix)
	if st.Nlink == 0 {
		if size := st.Blocks * blockSize; size > GhostLimit {
			s.refuse(p, errcode.FileTooLarge, "have it close or truncate the file before the checkpoint", "has the file %s open, which was removed and has %d MiB, and an image set contains at most %d MiB of one", name, size>>20, GhostLimit>>20)
			return false, nil
		}
		// CRIU has its content in the image set, and recreates it in the same
		// directory (criu/files-reg.c, open_remap_ghost).
		if mount != nil && readOnly(mount) && !saved {
			s.refuse(p, errcode.FileRemoved, reopen, "has the file %s open, which was removed or replaced on the read-only mount %s", name, mount.Mountpoint)
		}
		return false, nil
	}
	there, err := s.lookUp(name)
	if err != nil || there == own || !s.stays(link, name, own) {
		return there == own, nil //nolint:nilerr // CRIU reports it
	}
	if mount != nil && readOnly(mount) && !saved {
		s.refuse(p, errcode.FileRemoved, reopen, "has the file %s open, which was removed or replaced on the read-only mount %s", name, mount.Mountpoint)
		return false, nil
	}
	if there != (inode{}) {
		s.refuse(p, errcode.FileRenamed, reopen, "has the file %s open, and another file has taken its name", name)
		return false, nil
	}
	if saved {
		// CRIU's link to it is part of the image set as well.
		s.names.Linked = append(s.names.Linked, Linked{Path: name, Device: own.device, Inode: own.number})
		return false, nil
	}
	now, err := s.find(filepath.Dir(name), own)
	if err != nil {
		return false, err
	}
	switch before := s.names.Files[name]; {
	case now == "":
		s.refuse(p, errcode.FileRenamed, reopen, "has the file %s open, which was renamed or moved to another directory", name)
	case before != "" && before != now:
		s.refuse(p, errcode.FileRenamed, reopen, "has two files open that were called %s and are %s and %s now", name, before, now)
	default:
		s.names.Files[name] = now
	}
	return false, nil
}

// directory looks at an open or working directory. CRIU recreates one that was
// removed. To another that has lost its name it would make a link, which a
// directory cannot have.
func (s *nameSearch) directory(p *Process, name, link string, st *unix.Stat_t) (fine bool, _ error) {
	own := inode{st.Dev, st.Ino}
	if st.Nlink == 0 || strings.HasSuffix(name, deletedSuffix) {
		return false, nil
	}
	there, err := s.lookUp(name)
	if err != nil || there == own || !s.stays(link, name, own) {
		return there == own, nil //nolint:nilerr // CRIU reports it
	}
	s.refuse(p, errcode.FileRenamed, "have it leave and close the directory before the checkpoint, or undo that", "uses the directory %s, which something else was mounted over, or which was renamed or replaced on the host", name)
	return false, nil
}

// The major numbers of devices that CRIU opens again by their names: memory, such
// as null and random, and terminals (criu/files.c, dump_chrdev, and criu/tty.c).
// It knows TUN as well, but only in a network namespace of the images.
const (
	memoryMajor  = 1
	zeroMinor    = 5
	consoleMajor = 4
	ttyMajor     = 5
	serialMajor  = 204
	usbMajor     = 188
	masterMajor  = 128 // UNIX98_PTY_MASTER_MAJOR, the first of eight
)

// firstSerial is the minor number of the first serial line of the consoles' major
// number. Those below are virtual terminals, whose settings CRIU cannot set where
// there is no screen.
const firstSerial = 64

func restorableDevice(st *unix.Stat_t) bool {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return false
	}
	switch major := unix.Major(st.Rdev); major {
	case memoryMajor, ttyMajor, serialMajor, usbMajor:
		return true
	case consoleMajor:
		return unix.Minor(st.Rdev) >= firstSerial
	default:
		return major >= masterMajor && major <= lastSlaveMajor
	}
}

// siocUnixFile gives a descriptor of the file that a unix socket is bound to
// (linux/un.h).
const siocUnixFile = unix.SIOCPROTOPRIVATE

// socket looks at the name of a listening unix socket: connections that were
// made before do not need it.
func (s *nameSearch) socket(number uint32, o owner) error {
	file, bound, err := boundFile(o)
	if err != nil || file < 0 {
		return err
	}
	defer unix.Close(file)
	if on, err := s.c.mounts.mountOfFD(file); err != nil {
		return fmt.Errorf("file of socket %s: %w", bound, err)
	} else if !s.c.mounts.answers(on) {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(file, &st); err != nil {
		return fmt.Errorf("file of socket %s: %w", bound, err)
	}
	if st.Nlink == 0 {
		return nil // CRIU binds it and removes the name again
	}
	if !strings.HasPrefix(bound, "/") {
		return nil // CRIU notes the directory that it is relative to
	}
	own := inode{st.Dev, st.Ino}
	there, err := s.lookUp(bound)
	if err != nil || there == own {
		return nil // CRIU reports it
	}
	// The kernel knows a name that was changed in this guest.
	now, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", file))
	if err != nil {
		return err
	}
	if there, err := s.lookUp(now); err != nil {
		return err
	} else if there != own {
		if now, err = s.find(filepath.Dir(bound), own); err != nil {
			return err
		}
	}
	if now == "" {
		s.refuse(o.process, errcode.SocketMoved, "have it bind the name itself, or move the file back before the checkpoint", "listens on a unix socket that was bound to %s and was moved to another directory", bound)
		return nil
	}
	s.names.Sockets[number] = now
	return nil
}

// boundFile returns a descriptor of the file that a listening unix socket is
// bound to, and the name that it was bound by, or -1.
func boundFile(o owner) (file int, name string, err error) {
	process, err := pidfd.Open(o.process.PID)
	if err != nil {
		return -1, "", nil // exited meanwhile
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, o.fd, 0)
	if err != nil {
		return -1, "", nil // closed meanwhile
	}
	defer unix.Close(fd)
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listens == 0 {
		return -1, "", nil // no socket any more, or of a kind that has no listeners
	}
	address, err := unix.Getsockname(fd)
	if err != nil {
		return -1, "", nil // of a family that x/sys does not know
	}
	local, ok := address.(*unix.SockaddrUnix)
	if !ok || local.Name == "" || local.Name[0] == '@' {
		return -1, "", nil
	}
	file, err = unix.IoctlRetInt(fd, siocUnixFile)
	if err != nil {
		return -1, "", fmt.Errorf("file of the unix socket %s: %w", local.Name, err)
	}
	return file, local.Name, nil
}

// lookUp finds the file of a name; none if there is none.
func (s *nameSearch) lookUp(name string) (inode, error) {
	if found, ok := s.there[name]; ok {
		return found, nil
	}
	fd, err := s.tree.Open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		s.there[name] = inode{}
		return inode{}, nil
	}
	if err != nil {
		return inode{}, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return inode{}, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	s.there[name] = inode{st.Dev, st.Ino}
	return s.there[name], nil
}

// linkRemapPrefix begins the names of links that CRIU makes for the time of a
// dump, and leaves if it is killed.
const linkRemapPrefix = "link_remap."

// find finds a name of a file in a directory; empty if it has none there.
func (s *nameSearch) find(dir string, file inode) (string, error) {
	fd, err := s.tree.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if gone(err) || errors.Is(err, unix.ENOTDIR) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	names, err := d.Readdirnames(maxSearched)
	if err != nil && len(names) > 0 {
		return "", err
	}
	slices.Sort(names)
	for _, name := range names {
		if strings.HasPrefix(name, linkRemapPrefix) || s.tree.IsMountPoint(filepath.Join(dir, name)) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && (inode{st.Dev, st.Ino}) == file {
			return filepath.Join(dir, name), nil
		}
	}
	return "", nil
}
