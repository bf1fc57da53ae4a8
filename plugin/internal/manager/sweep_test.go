// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// What a power loss has left of containers and of checkpoints is removed at the
// first start after the boot, and never what is of this boot.
func TestSweep(t *testing.T) {
	boot, err := os.ReadFile(bootIDPath)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		note  []byte
		swept bool
	}{
		"another boot":        {[]byte("4f0ba1d5-5a4e-4b71-9f2e-2ad1a6f5d0f5\n"), true},
		"a note that is torn": {[]byte{}, true},
		"this boot":           {boot, false},
		"no note":             {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			state, images := filepath.Join(t.TempDir(), "state"), t.TempDir()
			exchange, bootstrap := adjust.ExchangeDir(state, "ns", "c1"), bundle.BootstrapDir(state, "ns", "s1", "b1")
			unfinished := filepath.Join(images, ".kata-checkpoint-0123456789abcdef")
			earlier, record := filepath.Join(images, "inventory.img"), filepath.Join(state, "restored", "shop--u-1--web")
			for _, dir := range []string{filepath.Join(exchange, "restore"), bootstrap, unfinished, filepath.Dir(record)} {
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			err := bundle.SetUnfinished(state, "ns", "c1", unfinished)
			for _, file := range []string{filepath.Join(exchange, "restore", "pages-1.img"), earlier, record} {
				err = errors.Join(err, os.WriteFile(file, nil, 0o600))
			}
			if tc.note != nil {
				err = errors.Join(err, os.WriteFile(filepath.Join(state, bootName), tc.note, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					if err := errors.Join(Sweep(state), RemoveSwept(state)); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if err := RemoveSwept(state); err != nil { // of them may have come too early
				t.Error(err)
			}
			if left, _ := os.ReadDir(filepath.Join(state, sweptDir)); len(left) > 0 {
				t.Errorf("there is left %v", left)
			}
			for _, path := range []string{exchange, bootstrap, unfinished} {
				if _, err := os.Stat(path); os.IsNotExist(err) != tc.swept {
					t.Errorf("%s: %v", path, err)
				}
			}
			for _, path := range []string{earlier, record} {
				if _, err := os.Stat(path); err != nil {
					t.Error(err)
				}
			}
			if now, err := os.ReadFile(filepath.Join(state, bootName)); err != nil || string(now) != string(boot) {
				t.Errorf("the note is %q (%v)", now, err)
			}
		})
	}
}

// A disk that is full at the first start after a boot must not make the next one
// take running containers for those of an earlier boot.
func TestSweepOnAFullDisk(t *testing.T) {
	for name, options := range map[string]string{"no space": "size=64k,nr_inodes=100", "no inodes": "size=1m,nr_inodes=8"} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			if err := unix.Mount("state", state, "tmpfs", 0, options); err != nil {
				t.Skip("needs to mount: ", err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			exchange := adjust.ExchangeDir(state, "ns", "c1")
			err := errors.Join(os.WriteFile(filepath.Join(state, bootName), []byte("another boot"), 0o600), os.MkdirAll(exchange, 0o700))
			for i := 0; err == nil; i++ { // until it is full
				err = os.WriteFile(filepath.Join(state, fmt.Sprint("filler-", i)), make([]byte, 4096), 0o600)
			}
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			if err := Sweep(state); err == nil {
				t.Fatal("it was noted on a full disk")
			}
			fillers, _ := filepath.Glob(filepath.Join(state, "filler-*"))
			for _, path := range fillers {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			// A container of this boot.
			if err := os.MkdirAll(exchange, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(Sweep(state), RemoveSwept(state)); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(exchange); err != nil {
				t.Errorf("a running container has lost its directory: %v", err)
			}
		})
	}
}
