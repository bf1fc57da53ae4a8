// SPDX-License-Identifier: Apache-2.0

// Package launch is the program that becomes CRIU (guestagent/launcher): started
// by the agent for each run of CRIU, it brings itself to where CRIU has to run and
// executes it. It is a program of its own because containers are frozen while it
// starts: it links little, so that Go initialises little.
//
// Statements about the internals of others refer to CRIU 4.2 and Linux 6.1 to
// 6.12.
package launch

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Run does the job in the directory of args[0], the link to the launcher that it was
// started by, and executes CRIU with the other arguments, or runs it as a child if
// there are connections to guard. It returns only on an error, which it leaves in
// the file [ErrorName] as well. The calling goroutine is locked to the main thread,
// whose namespaces execve and fork preserve.
func Run(args []string) error {
	dir := filepath.Dir(args[0])
	err := run(dir, args)
	if e := os.WriteFile(filepath.Join(dir, ErrorName), []byte(err.Error()), 0o600); e != nil {
		return fmt.Errorf("%w; %w", err, e)
	}
	return err
}

func run(dir string, args []string) error {
	data, err := os.ReadFile(filepath.Join(dir, JobName))
	if err != nil {
		return err
	}
	var job Job
	if err := json.Unmarshal(data, &job); err != nil {
		return fmt.Errorf("parse %s: %w", JobName, err)
	}
	if slices.Contains(job.Avoid, os.Getpid()) {
		return ErrPIDTaken
	}
	if err := setOOMScore(job); err != nil {
		return err
	}
	if err := inherit(job); err != nil {
		return err
	}
	if err := inheritPIDNamespace(job); err != nil {
		return err
	}
	if err := setUpMounts(dir, job); err != nil {
		return err
	}
	if err := showNamespaces(dir, job); err != nil {
		return err
	}
	if err := thread.Enter(job.Target, job.Join...); err != nil {
		return err
	}
	if job.Cgroup != "" {
		// The restored processes inherit it: they see their own cgroup as the
		// root, as before the checkpoint.
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("make a cgroup namespace: %w", err)
		}
	}
	if job.FreshProc {
		// Last: until here, PIDs are those of the guest's root PID namespace.
		if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
	}
	if len(job.Sockets) > 0 {
		return Guarded(job.Program, args, job.Env, job.Sockets)
	}
	if err := unix.Exec(job.Program, append([]string{"criu"}, args[1:]...), job.Env); err != nil {
		return fmt.Errorf("start %s: %w", job.Program, err)
	}
	return nil
}

// dumpOOMScore is the highest there is: where a guest has no memory for a dump, it
// loses the dump, and not a process of a container.
const dumpOOMScore = "1000"

// setOOMScore replaces the OOM score adjustment of the agent, which protects it.
// Restored processes inherit that of the placeholder.
func setOOMScore(job Job) error {
	score := []byte(dumpOOMScore)
	if job.Cgroup != "" {
		var err error
		if score, err = os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", job.Target)); err != nil {
			return fmt.Errorf("read the OOM score of the placeholder: %w", err)
		}
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", score, 0); err != nil {
		return fmt.Errorf("set the OOM score of CRIU: %w", err)
	}
	return nil
}

// inherit duplicates descriptors of the target for CRIU.
func inherit(job Job) error {
	if len(job.Inherit) == 0 {
		return nil
	}
	// /proc is still the guest's, but system calls use the PIDs of the
	// namespace that this process is in.
	target := job.Target
	if job.FreshProc {
		target = job.TargetInside
	}
	process, err := pidfd.Open(target)
	if err != nil {
		return fmt.Errorf("open process %d: %w", target, err)
	}
	defer unix.Close(process)
	for _, fd := range job.Inherit {
		got, err := unix.PidfdGetfd(process, fd, 0)
		if err != nil {
			return fmt.Errorf("duplicate descriptor %d of process %d: %w", fd, job.Target, err)
		}
		if err := unix.Dup3(got, InheritBase+fd, 0); err != nil {
			return fmt.Errorf("place descriptor %d: %w", fd, err)
		}
		unix.Close(got)
	}
	return nil
}

// inheritPIDNamespace opens a PID namespace for CRIU, in the guest's /proc.
func inheritPIDNamespace(job Job) error {
	if job.PIDNamespaceOf == 0 {
		return nil
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/pid", job.PIDNamespaceOf), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the PID namespace of process %d: %w", job.PIDNamespaceOf, err)
	}
	if err := unix.Dup3(fd, PIDNamespaceFD, 0); err != nil {
		return fmt.Errorf("place the PID namespace: %w", err)
	}
	return unix.Close(fd)
}

// setUpMounts gives this process a mount namespace of its own with the clones
// that the job lists. Its propagation is slave: CRIU copies the sharing of
// external mounts, which fails for private ones in guests whose mounts are
// shared.
func setUpMounts(dir string, job Job) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts slave: %w", err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	if onInitramfs(string(mounts)) {
		if err := rootOnTop(dir); err != nil {
			return fmt.Errorf("make a root above the initramfs: %w", err)
		}
	}
	if len(job.Mounts) == 0 {
		return nil
	}
	clones, err := cloneMounts(job)
	if err != nil {
		return err
	}
	scratch := filepath.Join(dir, "mnt")
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700"); err != nil {
		return fmt.Errorf("mount scratch directory: %w", err)
	}
	for i, m := range job.Mounts {
		if err := attach(clones[i], m); err != nil {
			return fmt.Errorf("set up mount %s: %w", m.Path, err)
		}
	}
	return nil
}

// onInitramfs reports whether the root directory is the initramfs, as with
// Kata's own initrd.
func onInitramfs(mounts string) bool {
	for line := range strings.Lines(mounts) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[1] == "/" {
			return fields[2] == "rootfs"
		}
	}
	return false
}

// rootOnTop gives this process, in a mount namespace of its own, a copy of its
// mounts for a root: CRIU pivots out of the root that it has, which nobody can if
// that is the initramfs (pivot_root(2), EINVAL).
func rootOnTop(dir string) error {
	at := filepath.Join(dir, "root")
	if err := os.Mkdir(at, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("/", at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	if err := unix.Mount(at, "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move: %w", err)
	}
	return unix.Chroot(".")
}

// showNamespaces covers the directories in /proc with the namespaces of some
// processes, in this mount namespace: the one that CRIU finds there for cgroups
// is the target's. The others are links into another mount of /proc.
func showNamespaces(dir string, job Job) error {
	if len(job.CgroupNamespaces) == 0 {
		return nil
	}
	proc := filepath.Join(dir, "proc")
	if err := os.Mkdir(proc, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", proc, err)
	}
	for _, pid := range job.CgroupNamespaces {
		own := fmt.Sprintf("/proc/%d/ns", pid)
		entries, err := os.ReadDir(own)
		if err != nil {
			return err
		}
		cover := filepath.Join(dir, fmt.Sprintf("ns-%d", pid))
		if err := os.Mkdir(cover, 0o700); err != nil {
			return err
		}
		for _, e := range entries {
			of := pid
			if e.Name() == "cgroup" {
				of = job.Target
			}
			if err := os.Symlink(fmt.Sprintf("%s/%d/ns/%s", proc, of, e.Name()), filepath.Join(cover, e.Name())); err != nil {
				return err
			}
		}
		if err := unix.Mount(cover, own, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", own, err)
		}
	}
	return nil
}

// cloneMounts clones mounts of the target's mount namespace and returns to this
// one. The clones are detached, with a descriptor each.
func cloneMounts(job Job) ([]int, error) {
	own, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open own mount namespace: %w", err)
	}
	defer unix.Close(own)
	null, err := unix.OpenTree(unix.AT_FDCWD, "/dev/null", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("clone /dev/null: %w", err)
	}
	if err := thread.Enter(job.Target, "mnt"); err != nil {
		return nil, err
	}
	clones := make([]int, len(job.Mounts))
	for i, m := range job.Mounts {
		fd, err := cloneMount(m.Path)
		if err != nil {
			if !m.Null {
				return nil, fmt.Errorf("the new container has no mount at %s, which the checkpoint needs: %w", m.Path, err)
			}
			fd = null
		}
		clones[i] = fd
	}
	if err := unix.Setns(own, unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("return to own mount namespace: %w", err)
	}
	return clones, nil
}

// cloneMount clones the mount whose root is at path. A path that is not the
// root of a mount is an error: the clone would show another part of a file
// system.
func cloneMount(path string) (int, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return -1, err
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return -1, unix.EINVAL
	}
	return unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
}

func attach(clone int, m MountClone) error {
	var st unix.Stat_t
	if err := unix.Fstat(clone, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := os.Mkdir(m.At, 0o700); err != nil {
			return err
		}
	} else if err := os.WriteFile(m.At, nil, 0o600); err != nil {
		return err
	}
	return unix.MoveMount(clone, "", unix.AT_FDCWD, m.At, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
