// SPDX-License-Identifier: Apache-2.0

// Package errcode gives errors the codes that users look up, as in "the process
// db (pid 7) uses io_uring, … (KC-2001)". A code is attached where an error is
// made or classified ([Code.Wrap], package internal/errclass), travels with the
// error, and becomes part of the text where the error leaves the program
// ([Text]): at the end of the sentence, and once. What arrives from another
// program of ours is taken apart again ([Parse]), so that what wraps it keeps
// the code at the end.
//
// codes.go has all codes, and docs/troubleshooting.md what each means.
package errcode

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/lazyregexp"
)

// Code is the number of a code. 0 is none.
type Code int

// prefix comes before the number.
const prefix = "KC-"

// String is the code as users see it.
func (c Code) String() string { return fmt.Sprintf("%s%04d", prefix, int(c)) }

// MarshalText is for JSON.
func (c Code) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText is for JSON.
func (c *Code) UnmarshalText(text []byte) error {
	e, ok := Lookup(string(text))
	if !ok {
		return fmt.Errorf("there is no code %q", text)
	}
	*c = e.Code
	return nil
}

// Name is the code's name in metrics, or "" for a code that does not exist.
func (c Code) Name() string {
	e, _ := Find(c)
	return e.Name
}

// Wrap gives an error the code, unless it has one already: the one that was
// attached first knows best.
func (c Code) Wrap(err error) error {
	if err == nil || Of(err) != 0 {
		return err
	}
	return &coded{c, err}
}

// Errorf is [fmt.Errorf] with the code, unless an error among args has one.
func (c Code) Errorf(format string, args ...any) error { return c.Wrap(fmt.Errorf(format, args...)) }

type coded struct {
	code Code
	err  error
}

func (c *coded) Error() string { return c.err.Error() }
func (c *coded) Unwrap() error { return c.err }

// Of returns the code that was attached to an error or to one that it wraps, or
// 0.
func Of(err error) Code {
	if c, ok := errors.AsType[*coded](err); ok {
		return c.code
	}
	return 0
}

// Reason is the code of an error, attached or in its text, or that of its kind.
// Of nil it is 0.
func Reason(err error) Code {
	if err == nil {
		return 0
	}
	_, c := take(err)
	return c
}

// Text is an error's message with its code at the end. An error without a code
// has that of its kind; one whose text has a code already, as one that another
// program of ours has printed, keeps it. Of nil it is empty.
func Text(err error) string {
	if err == nil {
		return ""
	}
	return With(take(err))
}

// take returns an error's message and its code.
func take(err error) (string, Code) {
	message := err.Error()
	if c := Of(err); c != 0 {
		return message, c
	}
	if rest, c := last(message); c != 0 {
		return rest, c
	}
	return message, kind(err)
}

// With appends a code to a sentence that does not end with one.
func With(sentence string, c Code) string {
	if _, has := Split(sentence); has != 0 || c == 0 {
		return sentence
	}
	return sentence + " (" + c.String() + ")"
}

// Parse returns an error with a message that another program of ours has made:
// with the code at its end attached, and without it in its text. The error has
// no class.
func Parse(message string) error {
	sentence, c := Split(message)
	if c == 0 {
		return errors.New(message)
	}
	return &coded{c, errors.New(sentence)}
}

// mark is a code in a text. It has the same length for every code.
var mark = lazyregexp.New(` \(` + prefix + `([0-9]{4})\)`)

const markLength = len(" (" + prefix + "0000)")

// Split returns a text without the code at its end, and the code; 0: there is
// none at its end.
func Split(text string) (string, Code) {
	begin := max(0, len(text)-markLength)
	m := mark.FindStringSubmatch(text[begin:])
	if m == nil {
		return text, 0
	}
	return text[:begin], number(m[1])
}

// last is [Split] for the last code in a text, wherever it is.
func last(text string) (string, Code) {
	all := mark.FindAllStringSubmatchIndex(text, -1)
	if len(all) == 0 {
		return text, 0
	}
	m := all[len(all)-1]
	return text[:m[0]] + text[m[1]:], number(text[m[2]:m[3]])
}

func number(digits string) Code {
	n, err := strconv.Atoi(digits)
	if err != nil {
		return 0
	}
	return Code(n)
}

// Lookup returns the code that a user has written, with or without the prefix
// and in any case.
func Lookup(text string) (Entry, bool) {
	n, err := strconv.Atoi(strings.TrimPrefix(strings.ToUpper(text), prefix))
	if err != nil {
		return Entry{}, false
	}
	return Find(Code(n))
}

// kinds are what has no code of its own, in the order in which they are looked
// for.
var kinds = []struct {
	err  error
	code Code
}{
	{unix.ENOSPC, NoSpace},
	{unix.EDQUOT, NoSpace},
	{context.DeadlineExceeded, Timeout},
	{context.Canceled, Canceled},
	{errdefs.ErrAborted, Canceled},
	{errdefs.ErrNotFound, NotFound},
	{errdefs.ErrAlreadyExists, Exists},
	{errdefs.ErrInvalidArgument, InvalidRequest},
	{errdefs.ErrFailedPrecondition, WrongState},
	{errdefs.ErrUnavailable, Unavailable},
	{errdefs.ErrPermissionDenied, Permission},
	{errdefs.ErrUnauthenticated, Permission},
	{errdefs.ErrResourceExhausted, NoSpace},
	{errdefs.ErrNotImplemented, NotImplemented},
	{fs.ErrPermission, Permission},
	{fs.ErrNotExist, NotFound},
	{fs.ErrExist, Exists},
}

func kind(err error) Code {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.code
		}
	}
	return Failed
}

// Entry describes a code.
type Entry struct {
	Code Code
	// Name is in metrics, where it is the reason of a failure: lower case, with
	// hyphens.
	Name string
	// Summary completes "it means that …".
	Summary string
}

var entries []Entry

func add(c Code, name, summary string) Code {
	entries = append(entries, Entry{c, name, summary})
	return c
}

// All returns all codes, by their number.
func All() []Entry {
	return slices.SortedFunc(slices.Values(entries), func(a, b Entry) int { return int(a.Code - b.Code) })
}

// Find returns the entry of a code.
func Find(c Code) (Entry, bool) {
	i := slices.IndexFunc(entries, func(e Entry) bool { return e.Code == c })
	if i < 0 {
		return Entry{}, false
	}
	return entries[i], true
}
