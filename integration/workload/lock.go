// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// lock holds a file lock that nobody else can get.
type lock struct {
	path  string
	file  *os.File
	count int
}

func (l *lock) take() (err error) {
	if l.file, err = os.OpenFile(l.path, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	return unix.Flock(int(l.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}

func (l *lock) round(w io.Writer) error {
	again, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer again.Close()
	if err := unix.Flock(int(again.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("the lock is lost: another lock gives %w", err)
	}
	l.count++
	_, err = fmt.Fprintln(w, "round", l.count)
	return err
}
