// SPDX-License-Identifier: Apache-2.0

package task

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
)

func TestAdviseFull(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want string // "": as it was
	}{
		"none":                         {nil, ""},
		"another":                      {errors.New("no such file"), ""},
		"of the host":                  {&fs.PathError{Op: "mkdir", Path: "/state", Err: unix.ENOSPC}, "the file system has no space or no inodes left: free some space"},
		"of a quota":                   {fmt.Errorf("write: %w", unix.EDQUOT), "the file system has no space"},
		"of the exchange directory":    {errors.New("mkdir /run/kata-checkpoint/exchange/c/checkpoint-x: no space left on device"), "the file system of state_dir on the host has no space"},
		"of the guest's own":           {errors.New("mkdir /run/kata-checkpoint/ops/1: no space left on device"), "give the VM more"},
		"one that has said what to do": {&budget.FullError{Path: "/state"}, ""},
		"one in words":                 {errors.New("no space left on device: free some, or use another"), ""},
	} {
		got := adviseFull(tc.err)
		if tc.want == "" {
			if got != tc.err { //nolint:errorlint // the very same
				t.Errorf("%s: %v", name, got)
			}
			continue
		}
		if got == nil || !strings.Contains(got.Error(), tc.want) || !errdefs.IsResourceExhausted(got) || !errors.Is(got, tc.err) {
			t.Errorf("%s: %v", name, got)
		}
	}
}
