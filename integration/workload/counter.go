// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// counter keeps its number in memory, in a file of the root file system and in
// a file in /dev/shm, and prints each number.
type counter struct {
	file, shm string
	n         int
}

func (c *counter) reset() error {
	c.n = 0
	return c.store()
}

func (c *counter) round(w io.Writer) error {
	file, shm, err := c.load()
	if err != nil {
		return fmt.Errorf("memory has %d: %w", c.n, err)
	}
	if file != c.n || shm != c.n {
		return fmt.Errorf("memory has %d, %s has %d, %s has %d", c.n, c.file, file, c.shm, shm)
	}
	c.n++
	if err := c.store(); err != nil {
		return err
	}
	// The files' numbers are printed as read back.
	if file, shm, err = c.load(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "tick %d file %d shm %d\n", c.n, file, shm)
	return err
}

func (c *counter) store() error {
	for _, path := range []string{c.file, c.shm} {
		// Renamed into place, so that nobody reads a partial file.
		if err := os.WriteFile(path+".new", []byte(strconv.Itoa(c.n)+"\n"), 0o644); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	return nil
}

func (c *counter) load() (file, shm int, err error) {
	if file, err = readNumber(c.file); err != nil {
		return 0, 0, err
	}
	shm, err = readNumber(c.shm)
	return file, shm, err
}

func readNumber(path string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}
