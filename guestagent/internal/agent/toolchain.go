// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// checkTimeout bounds `criu check`, which takes about a second without KVM.
const checkTimeout = time.Minute

// toolchain is the guest's CRIU, loaded and checked once, when it is first
// needed: most guests never need it.
type toolchain struct {
	// version loads CRIU and returns its version.
	version func() (uint32, error)
	// check returns what `criu check` complained about.
	check func() error
	// tracks reports whether the kernel notes which pages are written.
	tracks func() bool
}

func newToolchain(bundle string) *toolchain {
	t := &toolchain{}
	t.version = sync.OnceValues(func() (uint32, error) { return load(bundle) })
	t.check = sync.OnceValue(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
		defer cancel()
		return criu.Check(ctx)
	})
	t.tracks = sync.OnceValue(func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
		defer cancel()
		return criu.TracksMemory(ctx)
	})
	return t
}

// load loads CRIU. Its errors mean that no checkpoint can work in this guest,
// and say what to do.
func load(bundle string) (uint32, error) {
	// This file exists only with the option (kernel/pid_namespace.c).
	if _, err := os.Stat("/proc/sys/kernel/ns_last_pid"); err != nil {
		return 0, errclass.Precondition(errcode.KernelOption, "the guest kernel %s was built without CONFIG_CHECKPOINT_RESTORE: give Kata a kernel with the options of configs/kernel", kernelRelease())
	}
	if err := criu.Load(bundle); err != nil {
		return 0, errclass.Precondition(errcode.NoCRIU, "%w: install the whole guest bundle", err)
	}
	v, err := criu.Version()
	if err != nil {
		return 0, errclass.Precondition(errcode.NoCRIU, "CRIU does not run in the guest: %w: install the whole guest bundle", err)
	}
	if v < criu.MinVersion {
		return v, errclass.Precondition(errcode.OldCRIU, "CRIU %s in the guest is too old: install a guest bundle with %s or newer", criu.FormatVersion(v), criu.FormatVersion(criu.MinVersion))
	}
	return v, nil
}

// inspect returns what Info reports about CRIU: its version, the output of
// `criu check`, whether there are pre-dumps, and an error if no checkpoint can work. It waits no longer than
// ctx; the check itself continues for the next caller.
func (t *toolchain) inspect(ctx context.Context) (version uint32, check string, tracks bool, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if version, err = t.version(); err != nil {
			return
		}
		if e := t.check(); e != nil {
			check = e.Error()
			err = errcode.CRIUCheck.Errorf("CRIU cannot work in this guest: %w: give Kata a kernel with the options of configs/kernel", e)
			return
		}
		tracks = t.tracks()
	}()
	select {
	case <-done:
		return version, check, tracks, err
	case <-ctx.Done():
		return 0, "", false, ctx.Err()
	}
}
