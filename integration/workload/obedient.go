// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

// Exit statuses and lines of obedient.
const (
	TerminatedStatus = 43
	TerminatedLine   = "terminated"
	IgnoringLine     = "ignoring"
)

// obedient counts on stdout and stderr, exits with its own status on SIGTERM,
// and obeys commands in a file: "ignore" (SIGTERM, from then on) or "exit
// STATUS".
type obedient struct {
	command string
	stderr  io.Writer
	exit    func(status int)

	n       int
	signals chan os.Signal
}

func (o *obedient) listen() {
	o.signals = make(chan os.Signal, 1)
	signal.Notify(o.signals, syscall.SIGTERM)
}

func (o *obedient) round(w io.Writer) error {
	select {
	case <-o.signals:
		fmt.Fprintln(w, TerminatedLine)
		o.exit(TerminatedStatus)
	default:
	}
	if err := o.obey(w); err != nil {
		return err
	}
	o.n++
	fmt.Fprintf(o.stderr, "round %d\n", o.n)
	_, err := fmt.Fprintf(w, "round %d\n", o.n)
	return err
}

func (o *obedient) obey(w io.Writer) error {
	data, err := os.ReadFile(o.command)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Remove(o.command); err != nil {
		return err
	}
	switch word, rest, _ := strings.Cut(strings.TrimSpace(string(data)), " "); word {
	case "ignore":
		signal.Ignore(syscall.SIGTERM)
		_, err = fmt.Fprintln(w, IgnoringLine)
		return err
	case "exit":
		status, err := strconv.Atoi(rest)
		if err != nil {
			return fmt.Errorf("%s: %w", o.command, err)
		}
		o.exit(status)
		return nil
	default:
		return fmt.Errorf("%s: unknown command %q", o.command, word)
	}
}
