// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Source is a file in a directory that the guest has written.
type Source struct{ Directory, Name string }

// Part is a part of a source, by the source's number. Offset and size are in
// bytes.
type Part struct {
	Source       int
	Offset, Size int64
}

// Composition is the content of a file: parts of others, one after the other.
type Composition struct {
	Sources []Source
	Parts   []Part
}

// Compose has Collect put a file together from parts of others, in place of
// copying the one of that name. The sources are opened as any file of the guest's.
func (f *Follower) Compose(name string, c Composition) {
	if f.composed == nil {
		f.composed = make(map[string]Composition)
	}
	f.composed[name] = c
}

// compose makes the copy of a file that is composed.
func (f *Follower) compose(ctx context.Context, name string, c Composition, left *Limits) (_ File, err error) {
	sources, sizes, err := f.openSources(c.Sources)
	defer func() {
		for _, s := range sources {
			err = errclass.Join(err, s.Close())
		}
	}()
	if err != nil {
		return File{}, err
	}
	var size int64
	for _, p := range c.Parts {
		if p.Source < 0 || p.Source >= len(sources) || p.Offset < 0 || p.Size <= 0 || p.Size > sizes[p.Source] || p.Offset > sizes[p.Source]-p.Size || size > math.MaxInt64-p.Size {
			return File{}, errcode.GuestWroteWrong.Errorf("%s is to have %d bytes at %d of its source %d, which are not there", name, p.Size, p.Offset, p.Source)
		}
		size += p.Size
	}
	if err := left.Take(size); err != nil {
		return File{}, err
	}
	if f.growing[name] != nil {
		if err := f.forget(name); err != nil {
			return File{}, err
		}
	}
	out, err := create(f.dst, name)
	if err != nil {
		return File{}, err
	}
	defer func() { err = errclass.Join(err, out.Close()) }()
	sparse := budget.NewSparseWriter(out, f.room)
	r := &partReader{sources: sources, parts: c.Parts}
	n, sum, err := copyContext(ctx, &early{Writer: sparse, f: out}, r, copyBuffer, newDigest())
	if err == nil && n != size {
		err = errors.New("a part of it is shorter than it was")
	}
	if err == nil {
		err = sparse.Finish()
	}
	if err != nil {
		return File{}, fmt.Errorf("put %s together in %s: %w", name, f.dst.Name(), err)
	}
	return File{Name: name, Size: size, BLAKE3: sum}, nil
}

// openSources opens files in directories of the guest's. Those that it returns
// with an error are open, too.
func (f *Follower) openSources(list []Source) (sources []*os.File, sizes []int64, err error) {
	if len(list) > f.limits.Files {
		return nil, nil, errcode.GuestWroteWrong.Errorf("a file is to be put together from %d others", len(list))
	}
	top, err := openDir(f.src)
	if err != nil {
		return nil, nil, err
	}
	defer top.Close()
	for _, s := range list {
		if !imageNames.MatchString(s.Name) {
			return sources, nil, errcode.GuestWroteWrong.Errorf("%q is not an image of CRIU", s.Name)
		}
		dir, err := openDirBeneath(top, s.Directory)
		if err != nil {
			return sources, nil, err
		}
		file, st, err := openRegular(dir, s.Name)
		if err = errclass.Join(err, dir.Close()); err != nil {
			return sources, nil, err
		}
		sources, sizes = append(sources, file), append(sizes, st.Size)
	}
	return sources, sizes, nil
}

// partReader reads parts of files one after the other.
type partReader struct {
	sources []*os.File
	parts   []Part
	at      int64 // in the first part
}

// Read implements io.Reader. It fills p across the borders of parts, of which
// there may be one for each page.
func (r *partReader) Read(p []byte) (total int, err error) {
	for total < len(p) && len(r.parts) > 0 {
		part := r.parts[0]
		n, err := r.sources[part.Source].ReadAt(p[total:min(int64(len(p)), int64(total)+part.Size-r.at)], part.Offset+r.at)
		total += n
		if r.at += int64(n); r.at == part.Size {
			r.parts, r.at = r.parts[1:], 0
		} else if err != nil || n == 0 {
			return total, io.ErrUnexpectedEOF
		}
	}
	if total == 0 && len(r.parts) == 0 {
		return 0, io.EOF
	}
	return total, nil
}
