// SPDX-License-Identifier: Apache-2.0

package enter

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// FuzzPlan reads a plan as the helper does, which stops at what it does not
// understand: it has exactly what was asked for.
func FuzzPlan(f *testing.F) {
	f.Add([]byte(`{"args":["sh","-c","x"],"env":["HOME=/","PATH=/bin:"],"cwd":"/tmp","noNewPrivileges":true,"user":{"uid":1000,"gid":7,"additionalGids":[1,2]},
		"capabilities":{"bounding":["CAP_CHOWN","CAP_UNKNOWN"],"ambient":["cap_kill"]},"rlimits":[{"type":"RLIMIT_NOFILE","hard":18446744073709551615,"soft":1}]}`))
	f.Add([]byte(`{"args":["a\u0000b"]}`))
	f.Add([]byte(`{"args":[""],"env":["HOME=\n"],"oomScoreAdj":-1000}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		proc := &specs.Process{}
		if json.Unmarshal(data, proc) != nil {
			return
		}
		out, err := newPlan(os.Getpid(), proc, false)
		if err != nil {
			return
		}
		r := &planReader{t: t, rest: out}
		r.text()
		r.number()
		for range r.number() {
			r.number()
			r.number()
			r.number()
		}
		if cwd := r.text(); cwd != proc.Cwd && proc.Cwd != "" {
			t.Errorf("the directory is %q", cwd)
		}
		r.number()
		if (r.number() == 1) != proc.NoNewPrivileges {
			t.Error("no_new_privs differs")
		}
		for i := range r.number() {
			if g := r.number(); g != uint64(proc.User.AdditionalGids[i]) {
				t.Errorf("group %d is %d", i, g)
			}
		}
		if uid, gid := r.number(), r.number(); uid != uint64(proc.User.UID) || gid != uint64(proc.User.GID) {
			t.Errorf("user %d, group %d", uid, gid)
		}
		for range 5 {
			r.number()
		}
		r.texts()
		if args := r.texts(); !slices.Equal(args, proc.Args) {
			t.Errorf("the command is %q", args)
		}
		env := r.texts()
		if !slices.Equal(env[:len(proc.Env)], proc.Env) || len(env) > len(proc.Env)+1 {
			t.Errorf("the environment is %q", env)
		}
		if len(r.rest) > 0 {
			t.Errorf("there is more: %q", r.rest)
		}
	})
}

// planReader reads a plan as the helper does.
type planReader struct {
	t    *testing.T
	rest []byte
}

func (r *planReader) text() string {
	r.t.Helper()
	s, rest, ok := bytes.Cut(r.rest, []byte{0})
	if !ok {
		r.t.Fatal("the plan ends")
	}
	r.rest = rest
	return string(s)
}

func (r *planReader) number() uint64 {
	r.t.Helper()
	n, err := strconv.ParseUint(r.text(), 10, 64)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

func (r *planReader) texts() (out []string) {
	r.t.Helper()
	for range r.number() {
		out = append(out, r.text())
	}
	return out
}

// The passwd file is the container's own: whatever is in it, a command gets one
// absolute home.
func FuzzHome(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/sh\nbin:x:2:2::/bin:/bin/false\n"), uint32(2))
	f.Add([]byte("a:b:7:c:d:/x\x00/y:e"), uint32(7))
	f.Add([]byte("::0:::relative"), uint32(0))
	f.Fuzz(func(t *testing.T, passwd []byte, uid uint32) {
		home := homeIn(passwd, uid)
		if !strings.HasPrefix(home, "/") || strings.ContainsAny(home, "\x00\n") {
			t.Errorf("%q: the home of %d is %q", passwd, uid, home)
		}
	})
}

// What the helper reports is read, whatever it may be: without an error there is a
// process.
func FuzzReport(f *testing.F) {
	f.Add("pid 7\n")
	f.Add("pid 7\nfailed 2 exec\n")
	f.Add("failed -1 set groups")
	f.Fuzz(func(t *testing.T, report string) {
		p := &Prepared{command: "sh"}
		pid, err := p.parse(report)
		if err == nil && pid <= 0 {
			t.Errorf("%q: pid %d", report, pid)
		}
	})
}

// Filters are written one instruction after the other.
func FuzzFilterPlan(f *testing.F) {
	f.Add(uint16(6), uint8(1), uint8(255), uint32(1<<31), uint8(3))
	f.Fuzz(func(t *testing.T, code uint16, jt, jf uint8, k uint32, n uint8) {
		filter := slices.Repeat([]unix.SockFilter{{Code: code, Jt: jt, Jf: jf, K: k}}, int(n))
		r := &planReader{t: t, rest: filterPlan([][]unix.SockFilter{filter, filter})}
		for range r.number() {
			for range r.number() {
				i := r.number()
				if got := (unix.SockFilter{Code: uint16(i >> 48), Jt: uint8(i >> 40), Jf: uint8(i >> 32), K: uint32(i)}); got != (unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k}) {
					t.Fatalf("%+v", got)
				}
			}
		}
		if len(r.rest) > 0 {
			t.Errorf("there is more: %q", r.rest)
		}
	})
}
