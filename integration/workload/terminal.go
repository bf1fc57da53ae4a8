// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// terminal answers what is typed at its terminal: it numbers the lines, reports
// the terminal's size, and exits when told to.
type terminal struct {
	exit func(status int)

	n           int
	lines       chan string
	interrupted chan os.Signal
}

func (t *terminal) open() {
	t.lines, t.interrupted = make(chan string, 16), make(chan os.Signal, 16)
	signal.Notify(t.interrupted, syscall.SIGINT)
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			t.lines <- in.Text()
		}
	}()
}

func (t *terminal) round(w io.Writer) error {
	select {
	case <-t.interrupted:
		_, err := fmt.Fprintln(w, "interrupted")
		return err
	case line := <-t.lines:
		t.n++
		return t.answer(w, line)
	default:
		return nil
	}
}

func (t *terminal) answer(w io.Writer, line string) error {
	switch word, rest, _ := strings.Cut(line, " "); word {
	case "tell":
		size, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return fmt.Errorf("size of the terminal: %w", err)
		}
		_, err = fmt.Fprintf(w, "line %d: %d rows, %d columns\n", t.n, size.Row, size.Col)
		return err
	case "through":
		return t.through()
	case "exit":
		status, err := strconv.Atoi(rest)
		if err != nil {
			return err
		}
		t.exit(status)
		return nil
	default:
		_, err := fmt.Fprintf(w, "line %d: %s\n", t.n, line)
		return err
	}
}

// through writes to /dev/tty, the controlling terminal, and checks whose it is.
func (t *terminal) through() error {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer tty.Close()
	session, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGSID)
	if err != nil {
		return fmt.Errorf("session of the terminal: %w", err)
	}
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	if err != nil {
		return fmt.Errorf("foreground of the terminal: %w", err)
	}
	own, err := unix.Getsid(0)
	if err != nil {
		return err
	}
	if session != own || group != unix.Getpgrp() {
		return fmt.Errorf("the terminal belongs to session %d with foreground process group %d; the program is in session %d and group %d", session, group, own, unix.Getpgrp())
	}
	_, err = fmt.Fprintf(tty, "line %d: through\n", t.n)
	return err
}
