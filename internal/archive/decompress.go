// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bufio"
	"context"
	"errors"
	"io"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
)

const (
	// magicBytes are as many as containerd looks at.
	magicBytes = 10
	// maxWindow bounds the memory that a zstd stream may ask for: as much as the
	// zstd command accepts.
	maxWindow = 128 << 20
)

// Decompress returns the content of an archive that may be compressed. It fails
// once ctx is done, or when the archive expands beyond all reason. The caller
// closes it.
//
// containerd's own function would run programs that it finds on PATH, and give a
// zstd stream all the memory that it asks for.
func Decompress(ctx context.Context, r io.Reader) (io.ReadCloser, error) {
	ratio := &budget.Expansion{}
	in := bufio.NewReaderSize(ratio.In(budget.Reader(ctx, r)), 1<<20)
	magic, err := in.Peek(magicBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	d := &decompressor{}
	switch compression.DetectCompression(magic) {
	case compression.Gzip:
		g, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		d.Reader, d.close = g, func() { _ = g.Close() } // it has nothing to say
	case compression.Zstd:
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		d.Reader, d.close = z, z.Close
	default:
		d.Reader, d.close = in, func() {}
		return d, nil
	}
	// A decompressor may read little for long.
	d.Reader = budget.Reader(ctx, ratio.Out(d.Reader))
	return d, nil
}

type decompressor struct {
	io.Reader
	close func()
}

// Close implements [io.Closer].
func (d *decompressor) Close() error {
	d.close()
	return nil
}
