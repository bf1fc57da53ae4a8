// SPDX-License-Identifier: Apache-2.0

// Package metrics carries the figures of checkpoints and restores from the shims
// of a node, of which there is one for each sandbox, to the one process of the
// node that lives as long as it is scraped: kata-checkpoint-nri (package
// internal/exporter).
//
// They are small files in a directory, the spool, that this process makes and
// empties. A shim writes nothing where there is no such directory, never waits
// for anybody, and ends a file with a rename, so that nobody reads half of one.
// An operation in progress is a file with a lock, which ends with the shim that
// has it, whatever ended that.
package metrics

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Operations.
const (
	Checkpoint = "checkpoint"
	Restore    = "restore"
	// Frozen is the time for which a container was frozen for a checkpoint, which
	// ends after it.
	Frozen = "frozen"
)

// Success is the reason of what has not failed.
const Success = ""

// Report is what has become of an operation.
type Report struct {
	Operation string `json:"operation"`
	// Reason is the name of the error's code, or Success.
	Reason  string    `json:"reason,omitempty"`
	Begin   time.Time `json:"begin"`
	Seconds float64   `json:"seconds"`
	// Bytes is the size of the image set of a checkpoint.
	Bytes  int64   `json:"bytes,omitempty"`
	Phases []Phase `json:"phases,omitempty"`
	// Namespace is containerd's.
	Namespace string `json:"namespace,omitempty"`
	Container string `json:"container,omitempty"`
	// Traceparent is the trace that the caller has handed on, as W3C writes it, or
	// empty.
	Traceparent string `json:"traceparent,omitempty"`
}

// Phase is a step of an operation. One has begun when the one before it ended.
type Phase struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
}

// PreDump is the phase of all copies of a container's memory that are made while it
// runs.
const PreDump = "pre-dump"

// StageImages is the first phase of a restore. It is over when the operation
// begins: it is part of Create, and the operation of Start.
const StageImages = "stage images"

// phases are the names that phases have in metrics. Those of the guest come from
// there, and somebody who owns the guest might send any.
var phases = map[string]bool{
	"prepare": true, "wait for other dumps": true, PreDump: true, "freeze": true, "copy images": true, "thaw": true, "sync": true, "commit": true, "stop": true,
	"guest: inspect": true, "guest: criu dump": true, "guest: save /dev/shm": true, "guest: thaw": true, "guest: copy logs": true,
	"guest: other":                    true,
	StageImages:                       true,
	"guest: wait for the placeholder": true, "guest: restore /dev/shm": true, "guest: readdress sockets": true,
	"guest: mount the exec helper": true, "guest: make a PID namespace": true, "guest: criu restore": true,
	"guest: check the restored processes": true, "guest: restore the options of sockets": true,
}

// PhaseName is a phase's name in metrics.
func PhaseName(name string) string {
	if !phases[name] {
		return "other"
	}
	return name
}

const (
	runPrefix  = "run-"
	donePrefix = "done-"
	newPrefix  = ".new-"
	// maxFiles is how many reports a shim leaves to somebody who does not take
	// them.
	maxFiles = 1000
	// MaxReport is more than a report has, in bytes.
	MaxReport = 16 << 10
)

// Spool is the directory. Its zero value is none.
type Spool struct{ Dir string }

// Operation is one that is in progress.
type Operation struct {
	spool  Spool
	report Report
	// file has the lock, and is nil if nobody wants to know.
	file *os.File
	path string
}

// Begin notes an operation in progress. Where the spool cannot be written to, it
// is as if there were none.
func (s Spool) Begin(operation string) *Operation {
	o := &Operation{spool: s, report: Report{Operation: operation, Begin: time.Now()}}
	if !s.wanted() {
		return o
	}
	if file, path, err := s.write(runPrefix, &o.report); err == nil {
		o.file, o.path = file, path
	}
	return o
}

// End reports what has become of the operation. What the report says of its
// beginning and, unless it says anything, of its duration, is filled in.
func (o *Operation) End(r Report, failed error) {
	r.Operation, r.Begin = o.report.Operation, o.report.Begin
	if r.Seconds == 0 {
		r.Seconds = time.Since(r.Begin).Seconds()
	}
	if code := errcode.Reason(failed); code != 0 {
		r.Reason = code.Name()
	}
	o.spool.Report(r)
	o.Drop()
}

// Drop forgets the operation, without a report.
func (o *Operation) Drop() {
	if o.file == nil {
		return
	}
	_ = os.Remove(o.path) // without the lock the exporter does it
	o.file.Close()
	o.file = nil
}

// Elapsed is how long the operation has taken until now.
func (o *Operation) Elapsed() time.Duration { return time.Since(o.report.Begin) }

// Report leaves a report in the spool.
func (s Spool) Report(r Report) {
	if !s.wanted() {
		return
	}
	if file, _, err := s.write(donePrefix, &r); err == nil {
		file.Close()
	}
}

// wanted reports whether there is a spool, and room in it.
func (s Spool) wanted() bool {
	if s.Dir == "" {
		return false
	}
	dir, err := os.Open(s.Dir)
	if err != nil {
		return false
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(maxFiles) // io.EOF where there are none
	return len(names) < maxFiles
}

// write makes a file of the spool, which is returned open and locked, with its
// path.
func (s Spool) write(prefix string, r *Report) (_ *os.File, path string, err error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, "", err
	}
	id := strings.ToLower(rand.Text())
	at := filepath.Join(s.Dir, newPrefix+id)
	f, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			err = errclass.Join(err, f.Close(), os.Remove(at))
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, "", err
	}
	if _, err := f.Write(data); err != nil {
		return nil, "", err
	}
	path = filepath.Join(s.Dir, prefix+id)
	return f, path, os.Rename(at, path)
}

// Content is what Take finds.
type Content struct {
	Done, Running []Report
	// Invalid is how many files were not reports.
	Invalid int
}

// Open makes the spool: from then on, shims report.
func (s Spool) Open() error {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fmt.Errorf("make metrics_dir: %w", err)
	}
	st, err := os.Stat(s.Dir)
	if err != nil {
		return err
	}
	if st.Mode()&0o022 != 0 {
		return errcode.ForeignWriter.Errorf("metrics_dir %s can be written to by others than its owner, who could invent figures: remove that permission (chmod go-w)", s.Dir)
	}
	return nil
}

// Take removes the reports from the spool and returns them, and those of what is
// in progress. What a shim that is gone has left is removed.
func (s Spool) Take() (c Content, err error) {
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	for _, e := range entries {
		path := filepath.Join(s.Dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), donePrefix):
			r, rerr := read(path)
			if rerr == nil {
				c.Done = append(c.Done, r)
			} else {
				c.Invalid++
			}
			err = errclass.Join(err, os.Remove(path))
		case strings.HasPrefix(e.Name(), runPrefix):
			if locked(path) {
				if r, rerr := read(path); rerr == nil {
					c.Running = append(c.Running, r)
				}
				continue
			}
			err = errclass.Join(err, ignoreMissing(os.Remove(path))) // its shim may have been faster
		case strings.HasPrefix(e.Name(), newPrefix):
			if info, ierr := e.Info(); ierr == nil && time.Since(info.ModTime()) > time.Hour {
				err = errclass.Join(err, ignoreMissing(os.Remove(path)))
			}
		}
	}
	return c, err
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func read(path string) (r Report, err error) {
	f, err := os.Open(path)
	if err != nil {
		return r, err
	}
	defer f.Close()
	data := make([]byte, MaxReport)
	n, err := f.Read(data)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(data[:n], &r)
}

// locked reports whether the shim that has made the file still has it.
func locked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}
