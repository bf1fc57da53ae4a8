// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// debugConsolePort is the vsock port on which Kata's agent starts a shell for
// each connection, if its configuration enables that.
const debugConsolePort = 1026

// GuestExec runs a shell script as root in the guest's own namespaces, through
// the debug console of Kata's agent. It returns the script's stdout and stderr,
// interleaved, and its exit status. The script's stdin is empty. Processes that
// it starts in the background must close its output.
//
// id is the sandbox's id, not a container's.
func (t *Testbed) GuestExec(ctx context.Context, id, script string) (output []byte, status int, err error) {
	conn, err := t.DialGuest(ctx, id, debugConsolePort)
	if err != nil {
		return nil, 0, fmt.Errorf("guest exec: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	output, status, err = consoleExec(conn, script)
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		return output, 0, fmt.Errorf("guest exec: %w", err)
	}
	return output, status, nil
}

// DialGuest connects to a vsock port of the sandbox's guest.
func (t *Testbed) DialGuest(ctx context.Context, id string, port int) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", t.HybridSocket(id))
	if err != nil {
		return nil, fmt.Errorf("dial guest: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	err = handshake(conn, port)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("dial guest port %d: %w", port, errors.Join(err, ctx.Err()))
	}
	return conn, nil
}

// handshake requests a vsock port. The guest's first bytes may follow the
// answer immediately, so that nothing beyond its line may be read.
func handshake(conn net.Conn, port int) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return err
	}
	var line []byte
	for one := make([]byte, 1); !bytes.HasSuffix(line, []byte("\n")); {
		if _, err := io.ReadFull(conn, one); err != nil {
			return err
		}
		line = append(line, one...)
	}
	if !bytes.HasPrefix(line, []byte("OK")) {
		return fmt.Errorf("answer %q", line)
	}
	return nil
}

// consoleExec talks to a shell that may have a terminal, with a prompt, an echo
// and CRLF line ends, or a plain stream.
//
// It sends one line, which disables the echo, prints a start mark, reads the
// script by its length, runs it and prints its status after a mark that neither
// the echo nor the script can contain. The shell exits once the answer is
// acknowledged.
func consoleExec(conn io.ReadWriter, script string) ([]byte, int, error) {
	mark := rand.Text()
	file := "/tmp/." + mark
	_, err := fmt.Fprintf(conn, "stty raw -echo 2>/dev/null; printf '%%s%%s\\n' begin- %[1]s; head -c %[2]d >%[3]s; sh %[3]s </dev/null 2>&1; "+
		"printf '%%s%%s %%d\\n' end- %[1]s $?; rm %[3]s; read -r come; exit\n", mark, len(script), file)
	if err != nil {
		return nil, 0, err
	}
	in := &untilReader{r: conn}
	if _, err := in.until("begin-" + mark + "\n"); err != nil {
		return nil, 0, fmt.Errorf("no shell: %w", err)
	}
	if _, err := io.WriteString(conn, script); err != nil {
		return nil, 0, err
	}
	output, err := in.until("end-" + mark + " ")
	if err != nil {
		return output, 0, fmt.Errorf("shell exited: %w", err)
	}
	line, err := in.until("\n")
	if err != nil {
		return output, 0, fmt.Errorf("shell exited: %w", err)
	}
	status, err := strconv.Atoi(strings.TrimSpace(string(line)))
	if err != nil {
		return output, 0, fmt.Errorf("exit status: %w", err)
	}
	_, _ = io.WriteString(conn, "\n") // a shell that has exited has answered nevertheless
	return output, status, nil
}

// untilReader reads up to a delimiter.
type untilReader struct {
	r       io.Reader
	pending []byte
}

// until returns what precedes text and consumes text. On an error it returns
// everything it read.
func (u *untilReader) until(text string) ([]byte, error) {
	looked := 0
	for buffer := make([]byte, 32<<10); ; {
		if i := bytes.Index(u.pending[looked:], []byte(text)); i >= 0 {
			before := u.pending[:looked+i]
			u.pending = u.pending[looked+i+len(text):]
			return before, nil
		}
		looked = max(0, len(u.pending)-len(text)+1)
		n, err := u.r.Read(buffer)
		u.pending = append(u.pending, buffer[:n]...)
		if err != nil && n == 0 {
			before := u.pending
			u.pending = nil
			return before, err
		}
	}
}

// quote quotes a word for a shell.
func quote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=,@+%", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Command returns the script that runs a command with its arguments.
func Command(args ...string) string {
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = quote(a)
	}
	return strings.Join(words, " ")
}
