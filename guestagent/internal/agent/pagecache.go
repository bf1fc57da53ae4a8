// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

const (
	// dropEvery is the interval at which what CRIU has written is dropped from the
	// page cache.
	dropEvery = 500 * time.Millisecond
	// dropBehindFrom is how much of a file is dropped at once, in bytes, while CRIU
	// writes it: the guest's processor has other work then, and 256 MiB keep it busy
	// for a quarter of a second without KVM. What is less than that, and the end of
	// what is more, goes with the images, which the shim has removed in the guest
	// as soon as the container runs.
	dropBehindFrom = 512 << 20
	// lowest is the lowest priority of a thread.
	lowest = 19
)

// pageCache drops images from the guest's page cache. Nothing in the guest reads
// them again, and a page that the guest has once used remains allocated on the
// host.
type pageCache struct {
	images string
	sizes  map[string]int64 // of what was dropped
}

// drop drops the images that have grown by at least so many bytes since the last
// time. Others may write or remove them meanwhile.
func (p *pageCache) drop(atLeast int64) {
	found, err := filepath.Glob(filepath.Join(p.images, "pages-*.img"))
	if err != nil {
		return
	}
	for _, path := range found {
		st, err := os.Lstat(path)
		if err != nil || !st.Mode().IsRegular() || st.Size()-p.sizes[path] < atLeast {
			continue
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		if forget(fd) == nil {
			p.sizes[path] = st.Size()
		}
		unix.Close(fd)
	}
}

// forget drops a file from the page cache. CRIU and the container have precedence:
// the kernel lets others run after every few pages.
func forget(fd int) error {
	return thread.Do(func() error {
		if err := unix.Setpriority(unix.PRIO_PROCESS, 0, lowest); err != nil {
			return err
		}
		return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	})
}

// dropBehind drops what is written to a directory of images, in pieces of so many
// bytes. The returned function, which does not wait, ends that.
func dropBehind(images string, piece int64) (end func()) {
	done := make(chan struct{})
	go func() {
		p := &pageCache{images, make(map[string]int64)}
		tick := time.NewTicker(dropEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.drop(piece)
			case <-done:
				return
			}
		}
	}()
	return func() { close(done) }
}
