// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// bootIDPath is a file of the kernel's with another content after each boot.
const bootIDPath = "/proc/sys/kernel/random/boot_id"

const (
	// bootName is below the state directory: the boot in which it was swept.
	bootName = "boot-id"
	// sweptDir is below the state directory: what is to be removed.
	sweptDir = "swept"
)

// Sweep puts aside what the containers of an earlier boot have left in the state
// directory, with their memory in it: nobody deletes containers that a power loss
// has ended, and the names of pods' containers never come again. It comes before
// a daemon puts anything there, and does nothing more until the next boot. The
// caller has [RemoveSwept] remove it.
//
// A state directory without a note of the boot is new, or that of an earlier
// release, whose containers may be running.
func Sweep(stateDir string) error {
	boot, err := os.ReadFile(bootIDPath)
	if err != nil {
		return err
	}
	note := filepath.Join(stateDir, bootName)
	if last, err := os.ReadFile(note); err == nil && bytes.Equal(last, boot) {
		return nil
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return err
	}
	// Daemons that start at the same time wait for it.
	unlock, err := lock(stateDir, 0)
	if err != nil {
		return err
	}
	defer unlock()
	last, err := os.ReadFile(note)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err == nil && !bytes.Equal(last, boot):
		err = putAside(stateDir)
	}
	if err == nil {
		err = writeNote(note, boot)
	}
	if err != nil {
		// Containers are started all the same, and the next daemon must not take them
		// for those of an earlier boot: without a note it does not.
		return errclass.Join(err, removeIfExists(note))
	}
	return nil
}

// writeNote writes a file whole, or not at all.
func writeNote(path string, data []byte) error {
	next := path + ".new"
	err := os.WriteFile(next, data, 0o600)
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return errclass.Join(err, removeIfExists(next))
	}
	return nil
}

func removeIfExists(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func putAside(stateDir string) error {
	to := filepath.Join(stateDir, sweptDir, rand.Text())
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for _, dir := range []string{
		filepath.Dir(adjust.ExchangeDir(stateDir, "", "")), filepath.Dir(bundle.BootstrapDir(stateDir, "", "", "")), bundle.UnfinishedDir(stateDir),
	} {
		if err := os.Rename(dir, filepath.Join(to, filepath.Base(dir))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// RemoveSwept removes what [Sweep] has put aside, and the unfinished image sets
// that are noted there. If it is killed, the next one does the rest; while one is
// running, others do nothing.
func RemoveSwept(stateDir string) error {
	swept := filepath.Join(stateDir, sweptDir)
	entries, err := os.ReadDir(swept)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	unlock, err := lock(swept, unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	for _, e := range entries {
		dir := filepath.Join(swept, e.Name())
		// An image directory may be on a file system that is not mounted any more: its
		// note is not kept for that.
		err = errclass.Join(err, bundle.RemoveAllUnfinished(dir), remove.All(dir))
	}
	return err
}

// lock locks a directory.
func lock(path string, flags int) (unlock func(), err error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|flags); err != nil {
		return nil, errclass.Join(fmt.Errorf("lock %s: %w", path, err), dir.Close())
	}
	return func() { dir.Close() }, nil
}
