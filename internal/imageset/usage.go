// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// CheckUsage reports whether a directory that a guest may write to is within
// limits: its files and the blocks that they occupy, in the directory and in
// those directly below it, and what else the file system has free. It opens
// nothing but directories. There may be none.
func CheckUsage(ctx context.Context, path string, limits Limits) error {
	top, err := openDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer top.Close()
	if err := budget.NewRoom(top, limits.Reserve).Check(0); err != nil {
		return err
	}
	u := &usage{ctx: ctx, left: limits}
	return u.add(top, true)
}

type usage struct {
	ctx  context.Context
	left Limits
}

func (u *usage) add(dir *os.File, directories bool) error {
	for {
		names, err := dir.Readdirnames(1024)
		if isEOF(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if u.ctx.Err() != nil {
			return context.Cause(u.ctx)
		}
		for _, name := range names {
			if err := u.addOne(dir, name, directories); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
}

func (u *usage) addOne(dir *os.File, name string, directories bool) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if err := u.left.Take(st.Blocks * blockSize); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	if !directories {
		return errcode.Damaged.Errorf("there is a directory, %q, in an image set, which is flat", name)
	}
	below, err := openDirBeneath(dir, name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil // it is another file by now, and counted
	}
	if err != nil {
		return err
	}
	defer below.Close()
	return u.add(below, false)
}

// blockSize is the unit of st_blocks, in bytes.
const blockSize = 512
