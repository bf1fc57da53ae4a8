// SPDX-License-Identifier: Apache-2.0

package task

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// fullErrors are those of a file system that lacks space, inodes or quota.
var fullErrors = []error{unix.ENOSPC, unix.EDQUOT}

// adviseFull adds to the error of a full file system what to do about it, if the
// error does not have that yet.
func adviseFull(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	full := slices.ContainsFunc(fullErrors, func(e error) bool {
		return errors.Is(err, e) || strings.Contains(text, e.Error()) // an error of the agent's is a text
	})
	if !full || errors.As(err, new(*budget.FullError)) || strings.Contains(text, "free some") {
		return err
	}
	where := "the file system"
	switch {
	case strings.Contains(text, api.StateDir+"/exchange/"):
		where = "the file system of state_dir on the host"
	case strings.Contains(text, api.StateDir):
		return errclass.With(errdefs.ErrResourceExhausted, fmt.Errorf("%w: the guest's memory is full: have its containers use less, or give the VM more", err))
	}
	return errclass.With(errdefs.ErrResourceExhausted, fmt.Errorf("%w: %s has no space or no inodes left: free some space, or remove files", err, where))
}
