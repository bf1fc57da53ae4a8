// SPDX-License-Identifier: Apache-2.0

package guestinitrd

import (
	"bytes"
	"fmt"
	"io/fs"
	"strings"
)

// The format newc, as the kernel reads it
// (Documentation/driver-api/early-userspace/buffer-format.rst).
const (
	newc = "070701"
	// headerSize is that of a header, in bytes: newc and 13 numbers of eight
	// hexadecimal digits.
	headerSize = 6 + 13*8
	// sizeField is where the file's size is in a header.
	sizeField = 6 + 6*8
	// blockSize is a multiple of what archives and their parts have to begin at.
	blockSize = 512
	trailer   = "TRAILER!!!"
)

// cpio is an archive that is being written. Everything in it belongs to root and
// has no time.
type cpio struct {
	out   bytes.Buffer
	inode int
}

// add adds a file, a directory or a symbolic link, whose target is data.
func (c *cpio) add(path string, mode fs.FileMode, data []byte) {
	c.inode++
	unix := uint32(mode.Perm())
	switch mode.Type() {
	case fs.ModeDir:
		unix |= 0o040000
	case fs.ModeSymlink:
		unix |= 0o120000
	default:
		unix |= 0o100000
	}
	c.entry(strings.TrimPrefix(path, "/"), c.inode, unix, data)
}

func (c *cpio) entry(name string, inode int, mode uint32, data []byte) {
	c.out.WriteString(newc)
	for _, n := range []int{inode, int(mode), 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0} {
		fmt.Fprintf(&c.out, "%08X", n)
	}
	c.out.WriteString(name)
	c.out.WriteByte(0)
	c.pad(4)
	c.out.Write(data)
	c.pad(4)
}

// pad fills up to a multiple of n.
func (c *cpio) pad(n int) {
	c.out.Write(make([]byte, align(c.out.Len(), n)-c.out.Len()))
}

// end ends the archive and returns it.
func (c *cpio) end() []byte {
	c.entry(trailer, 0, 0, nil)
	c.pad(blockSize)
	return c.out.Bytes()
}

// align is the next multiple of a power of two.
func align(n, to int) int { return (n + to - 1) &^ (to - 1) }
