// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"unicode"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/lazyregexp"
)

// Error is the failure of a dump or restore. Its message is one line: CRIU's log
// has the rest.
type Error struct {
	What string
	// Err is what CRIU failed by, or how it ended.
	Err error
	// Advice is what to do about it, if that is known.
	Advice string
}

func (e *Error) Error() string {
	text := fmt.Sprintf("criu %s failed: %v", e.What, e.Err)
	if e.Advice == "" {
		return text
	}
	return fmt.Sprintf("%s (%s)", e.Advice, text)
}

func (e *Error) Unwrap() error { return e.Err }

// advices are what to do about a failure, by what CRIU's log contains.
var advices = []struct {
	sign   string
	code   errcode.Code
	advice string
}{
	{"External socket is used", errcode.UnixSocket, "a process has a unix socket that is connected to outside of the container: close the connection before the checkpoint"},
	{"No space left on device", errcode.NoSpace, "no space left for the images in the shim's state_dir on the host: free some, or set state_dir to a directory on another file system"},
}

// errorLine matches an error in CRIU's log: the time, in a restore the process,
// and the place in the source (criu/log.c). What runs inside of the processes
// puts "pie" in front.
var errorLine = lazyregexp.New(`^\(\d+\.\d+\)\s+(?:pie: )?(?:\d+: )?Error \([^)]*\): (.*)`)

// maxCause bounds what is quoted of a log, in characters.
const maxCause = 300

// cause returns the first error in a log of CRIU's, of which the others are
// consequences, and what to do about any of them, with its code. Each may be
// empty.
func cause(path string) (first, advice string, code errcode.Code) {
	f, err := os.Open(path)
	if err != nil {
		return "", "", 0
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		m := errorLine.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		if first == "" {
			first = printable(m[1])
		}
		for _, a := range advices {
			if advice == "" && strings.Contains(m[1], a.sign) {
				advice, code = a.advice, a.code
			}
		}
	}
	return first, advice, code
}

// printable makes a text fit for a message. It may contain names that the
// container has chosen.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, strings.TrimSpace(text))
	if runes := []rune(text); len(runes) > maxCause {
		text = string(runes[:maxCause]) + "..."
	}
	return text
}

// runIDSign stands before the id that a CRIU has chosen for its run (util_init in
// criu/util.c).
const runIDSign = "CRIU run id = "

// RunID finds the id of the run in a log of CRIU's, after which its network lock is
// named; empty if the log lacks it. A CRIU that serves a request chooses one when
// it starts and another one for the request, and says so in two lines before
// anything of the container is in its log.
func RunID(path string) (run string) {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if _, id, ok := strings.Cut(s.Text(), runIDSign); ok {
			run = strings.TrimPrefix(strings.TrimSpace(id), "0x")
		} else if run != "" {
			break
		}
	}
	return run
}
