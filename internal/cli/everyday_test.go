// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
	"github.com/kata-checkpoint/kata-checkpoint/internal/teststore"
)

// operator is a node's state directory, and the command with it.
type operator struct {
	*testing.T
	state, config string
	store         *store.Store
	key           *signing.Key
}

func newOperator(t *testing.T) *operator {
	t.Helper()
	o := &operator{T: t, state: teststore.Dir(t)}
	o.config = o.path("config.toml")
	o.write("config.toml", "state_dir = '"+o.state+"'\nrestore_dir = '"+o.path("restore")+"'\nreserve_bytes = 0\n")
	o.store = store.New(o.state)
	var err error
	if o.key, err = signing.Load(o.path("signing-key.pem")); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *operator) path(name string) string { return filepath.Join(o.state, name) }

func (o *operator) write(name, text string) {
	o.Helper()
	if err := os.WriteFile(o.path(name), []byte(text), 0o600); err != nil {
		o.Fatal(err)
	}
}

// add puts a checkpoint into the store, so many days old.
func (o *operator) add(name string, daysOld int, change ...func(*teststore.Checkpoint)) {
	o.Helper()
	c := teststore.Checkpoint{Name: name, Key: o.key, Memory: "memory", Rootfs: map[string]string{"etc/app": "1"}, Record: store.Record{
		Engine: "nerdctl", Namespace: "default", Container: "0123456789abcdef", ContainerName: "web", Image: "docker.io/library/web:1",
		Created: time.Now().Add(-time.Duration(daysOld)*24*time.Hour - time.Minute), Took: 5 * time.Second, Frozen: 4 * time.Second,
	}}
	for _, f := range change {
		f(&c)
	}
	teststore.Add(o.T, o.store, c)
}

func (o *operator) run(args ...string) (status int, stdout, stderr string) {
	o.Helper()
	var out, errs bytes.Buffer
	status = Run(o.Context(), append(args, "--config", o.config), &out, &errs)
	return status, out.String(), errs.String()
}

// want runs the command and checks its exit status and what it says. An error has
// a code of its own.
func (o *operator) want(status int, what []string, args ...string) string {
	o.Helper()
	got, stdout, stderr := o.run(args...)
	if got != status {
		o.Errorf("%v: status %d, want %d: %s%s", args, got, status, stdout, stderr)
	}
	if _, code := errcode.Split(strings.TrimSpace(stderr)); strings.Contains(stderr, "kata-checkpoint: ") && status == exitError && (code == 0 || code >= errcode.Failed) {
		o.Errorf("%v: an error without a code of its own: %s", args, stderr)
	}
	for _, w := range what {
		if !strings.Contains(stdout+stderr, w) {
			o.Errorf("%v says nothing of %q: %s%s", args, w, stdout, stderr)
		}
	}
	return stdout
}

func TestListAndRemove(t *testing.T) {
	o := newOperator(t)
	o.want(0, []string{"NAME"}, "ls")
	if out := o.want(0, nil, "ls", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("an empty list is %q", out)
	}
	o.add("old", 9)
	o.add("middle", 5)
	o.add("new", 0)
	out := o.want(0, []string{"old", "web", "nerdctl"}, "ls")
	if strings.Index(out, "old") > strings.Index(out, "new") {
		t.Errorf("the order is not that of their age: %s", out)
	}
	var list []listed
	if err := json.Unmarshal([]byte(o.want(0, nil, "ls", "--json")), &list); err != nil || len(list) != 3 || list[0].Name != "old" || list[0].Bytes == 0 || list[0].Took != 5*time.Second {
		t.Errorf("%+v, %v", list, err)
	}
	o.want(2, []string{"nothing says which"}, "prune")
	o.want(2, []string{"is not an age"}, "prune", "--older-than", "soon")
	o.want(2, []string{"is not a size"}, "prune", "--max-size", "much")
	o.want(0, nil, "keep", "old")
	o.want(0, []string{"keep"}, "ls")
	if out := o.want(0, []string{"middle", "would be removed", "newer ones of web"}, "prune", "--keep-last", "1", "--dry-run"); strings.Contains(out, "old: ") || strings.Contains(out, "new: ") {
		t.Errorf("prune removes %s", out)
	}
	o.want(0, []string{"middle: "}, "prune", "--older-than", "3d")
	o.want(2, []string{"no such checkpoint"}, "rm", "middle")
	o.want(2, []string{"is to be kept"}, "rm", "new", "old")
	o.want(0, []string{"new"}, "ls") // nothing of it was removed
	o.want(0, []string{"new: removed"}, "rm", "new")
	o.want(0, nil, "keep", "--undo", "old")
	o.want(0, nil, "rm", "old")
	o.want(2, []string{"no such checkpoint"}, "restore", "old", "--address", o.path("none"))
}

func TestInspect(t *testing.T) {
	o := newOperator(t)
	o.add("a", 1)
	out := o.want(0, []string{
		"Name:      a", "web, ID 0123456789abcdef in namespace default of nerdctl", "Signature: by SHA256:", "node trusts\n", "  1 init", "  |- 7 worker", "  |  `- 9 child",
		"  `- 8 logger", "host name was \"host\"", "Time:      5.00 s in all, of which the container was frozen for 4.00 s", "Linux 6.12, CRIU 4.2.0",
		"freeze                  1.000 s  #############\n", "dump                    3.000 s  ########################################\n",
	}, "inspect", "a")
	for line := range strings.Lines(out) {
		if len(line) > 81 {
			t.Errorf("longer than 80 columns: %s", line)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Error("colours without a terminal")
	}
	var i inspected
	if err := json.Unmarshal([]byte(o.want(0, nil, "inspect", "a", "--json")), &i); err != nil || i.Trust != "trusted" || i.Sizes.Memory != 6 || len(i.Processes) != 1 || len(i.Phases) != 2 {
		t.Errorf("%+v, %v", i, err)
	}
	// A pod's are shown together.
	for _, name := range []string{"app", "log"} {
		o.add("g-"+name, 0, func(c *teststore.Checkpoint) {
			c.Record.Group, c.Record.ContainerName, c.Record.Pod, c.Key = "g", name, &store.Pod{Namespace: "shop", Name: "front"}, nil
		})
	}
	o.want(0, []string{"shop/front/app", "shop/front/log", "Signature: none", "/dev/shm is the pod's"}, "inspect", "g")
}

func TestVerify(t *testing.T) {
	o := newOperator(t)
	o.add("good", 0)
	o.add("unsigned", 0, func(c *teststore.Checkpoint) { c.Key = nil })
	other, err := signing.Load(o.path("other.pem"))
	if err != nil {
		t.Fatal(err)
	}
	o.add("foreign", 0, func(c *teststore.Checkpoint) { c.Key = other })
	o.add("damaged", 0)
	o.write("checkpoints/damaged/checkpoint/pages-1.img", "MEMORY")
	o.add("changed", 0)
	o.write("checkpoints/changed/rootfs-diff.tar", "x")

	o.want(0, []string{"all as they were written", "which this node trusts", "100 %"}, "verify", "good")
	o.want(1, []string{"it is not signed"}, "verify", "unsigned")
	o.want(1, []string{"not trusted on this node", "trust add"}, "verify", "foreign", "good")
	o.want(2, []string{"file pages-1.img is damaged", "cure: "}, "verify", "damaged")
	o.want(2, []string{"rootfs-diff.tar is damaged"}, "verify", "changed")
	o.want(2, []string{"name checkpoints, or give --all"}, "verify")
	var findings check.Findings
	if err := json.Unmarshal([]byte(o.want(2, nil, "verify", "--all", "--json", "--progress", "none")), &findings); err != nil || findings.Worst() != check.Error {
		t.Errorf("%v, %v", findings, err)
	}
	o.want(2, []string{"pages-1.img"}, "export", "damaged", o.path("x"))
	if _, err := os.Stat(o.path("x")); err == nil {
		t.Error("half an archive is left")
	}
}

func TestTrust(t *testing.T) {
	o := newOperator(t)
	pem := o.want(0, []string{"BEGIN PUBLIC KEY"}, "trust", "show")
	o.want(0, []string{signing.Fingerprint(o.key.Public()), "(this node)"}, "trust", "list")
	other, err := signing.Load(o.path("other.pem"))
	if err != nil {
		t.Fatal(err)
	}
	fingerprint := signing.Fingerprint(other.Public())
	o.add("foreign", 0, func(c *teststore.Checkpoint) { c.Key = other })
	o.want(1, nil, "verify", "foreign")
	o.want(2, []string{"no PEM block"}, "trust", "add", o.config)
	o.want(2, []string{"PRIVATE KEY"}, "trust", "add", o.path("other.pem"))
	for range 2 { // twice is as once
		o.want(0, []string{fingerprint + ": trusted"}, "trust", "add", o.path("other.pem.pub"))
	}
	o.want(0, nil, "verify", "foreign")
	if out := o.want(0, []string{fingerprint}, "trust", "list"); strings.Count(out, "\n") != 2 {
		t.Errorf("trusted are %s", out)
	}
	o.want(2, []string{"no key"}, "trust", "remove", signing.Fingerprint(o.key.Public()))
	o.want(0, []string{"not trusted any longer"}, "trust", "remove", fingerprint[:12])
	o.want(1, nil, "verify", "foreign")
	// What is no key is not passed over.
	o.write("text", pem)
	o.want(0, nil, "trust", "add", o.path("text"))
	o.write("trusted-keys/bad.pub", "x")
	o.want(2, []string{"bad.pub", "remove it"}, "trust", "list")
}

func TestExportAndImport(t *testing.T) {
	o := newOperator(t)
	o.add("a", 3)
	file := o.path("a.tar.zst")
	o.want(0, []string{"a: " + file}, "export", "a", file)
	o.want(2, []string{"exists: name another file, or give --force"}, "export", "a", file)
	o.want(0, nil, "export", "a", file, "--force")
	o.want(2, []string{"there is a checkpoint of this name already"}, "import", file)
	o.want(0, []string{"b: ", "of web"}, "import", file, "b")
	o.want(0, nil, "diff", "a", "b")
	o.want(0, nil, "verify", "b")
	o.want(0, nil, "rm", "a")
	o.want(0, []string{"a: "}, "import", file) // by the file's name
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	o.write("key", key.String()+"\n")
	o.write("to", "# a node\n"+key.Recipient().String()+"\n")
	for n, to := range []string{key.Recipient().String(), o.path("to")} {
		file := o.path([]string{"x.age", "y.age"}[n])
		o.want(0, []string{"encrypted"}, "export", "a", file, "--recipient", to)
		o.want(2, []string{"--identity"}, "import", file)
		o.want(0, nil, "import", file, "--identity", o.path("key"))
	}
	o.want(2, []string{"neither a key that begins with age1 nor a file"}, "export", "a", o.path("z"), "--recipient", "somebody")
	o.want(2, []string{"not a checkpoint archive"}, "import", o.config, "c")
	if _, stdout, _ := o.run("export", "a", "-", "--compress", "none"); !strings.HasPrefix(stdout, "checkpoint/") {
		t.Errorf("the standard output begins with %.20q", stdout)
	}
	entries, err := os.ReadDir(o.store.Dir())
	if err != nil || len(entries) != 4 {
		t.Errorf("there is %v (%v)", entries, err)
	}
}

// What is most often wrong has a code of its own.
func TestEverydayErrors(t *testing.T) {
	o := newOperator(t)
	o.add("a", 1)
	o.add("pinned", 1)
	o.want(0, nil, "keep", "pinned")
	o.write("broken.pub", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
	for code, commands := range map[errcode.Code][][]string{
		errcode.Usage: {
			{"ls", "--colour"}, {"create"}, {"export", "a", o.path("x"), "--compress", "lzma"},
		},
		errcode.NoCheckpoint:   {{"inspect", "none"}, {"rm", "none"}, {"export", "none", o.path("x")}, {"diff", "a", "none"}},
		errcode.CheckpointName: {{"import", o.path("config.toml"), "../x"}},
		errcode.Kept:           {{"rm", "pinned"}},
		errcode.AgeKey: {
			{"export", "a", o.path("x"), "--recipient", "somebody"}, {"export", "a", o.path("x"), "--recipient", "age1x"},
			{"import", o.path("x"), "b", "--identity", o.path("none")}, {"import", o.path("x"), "b", "--identity", o.path("config.toml")},
		},
		errcode.TrustedKey: {
			{"trust", "remove", "abc"}, {"trust", "add", o.path("broken.pub")}, {"trust", "add", o.path("config.toml")},
			{"trust", "add", o.path("none")},
		},
		errcode.NoArchive: {{"import", o.path("none"), "b"}},
		errcode.NoEngine: {
			{"create", "c", "x", "--address", o.path("none")}, {"pod", "c", "x", "--address", o.path("none")}, {"restore", "a", "--address", o.path("none")},
		},
	} {
		for _, args := range commands {
			t.Run(strings.Join(args[:min(2, len(args))], " "), func(t *testing.T) {
				inner := *o
				inner.T = t
				inner.want(exitError, []string{code.String()}, args...)
			})
		}
	}
}

func TestDiff(t *testing.T) {
	o := newOperator(t)
	o.add("a", 1)
	o.add("b", 0, func(c *teststore.Checkpoint) {
		c.Rootfs = map[string]string{"etc/app": "2", "etc/new": "x"}
		c.Processes = []teststore.Process{{PID: 1, Name: "init"}, {PID: 7, Parent: 1, Name: "other"}}
		c.Memory = "more memory"
	})
	out := o.want(1, []string{
		"~ file /etc/app: 1 bytes", "+ file /etc/new: 1 bytes", "- process 8: logger", "~ process 7: worker, 1 threads -> other, 1 threads", "~ size of memory: 6 B -> 11 B",
	}, "diff", "a", "b")
	if strings.Contains(out, "container") || strings.Contains(out, "process 1:") {
		t.Errorf("what is alike differs: %s", out)
	}
	o.want(0, nil, "diff", "a", "a")
	o.want(2, []string{"no such checkpoint"}, "diff", "a", "c")
}

// All of the help fits on a terminal, flags included.
func TestHelp(t *testing.T) {
	var walk func(args []string)
	walk = func(args []string) {
		c, _, err := Command().Find(args)
		if err != nil {
			t.Fatal(err)
		}
		for _, sub := range c.Commands() {
			if !sub.Hidden && sub.Name() != "completion" && sub.Name() != "help" {
				walk(append(slices.Clip(args), sub.Name()))
			}
		}
		var out bytes.Buffer
		if status := Run(t.Context(), append(slices.Clip(args), "--help"), &out, &out); status != 0 {
			t.Errorf("%v --help: status %d", args, status)
		}
		for line := range strings.Lines(out.String()) {
			if len(line) > 81 {
				t.Errorf("%v --help: longer than 80 columns: %s", args, line)
			}
		}
	}
	walk(nil)
	var out bytes.Buffer
	if status := Main(t.Context(), []string{"/usr/bin/" + KubectlName, "create", "--help"}, &out, &out); status != 0 || !strings.Contains(out.String(), "kubectl kata-checkpoint create POD [flags]") {
		t.Errorf("as a plugin: status %d: %s", status, out.String())
	}
	for line := range strings.Lines(out.String()) {
		if len(line) > 81 {
			t.Errorf("longer than 80 columns: %s", line)
		}
	}
}

// Who pauses a container and is killed has it resumed.
func TestReleased(t *testing.T) {
	for told, want := range map[string]bool{"resumed\n": true, "": false, "resum": false, "x": false} {
		if got := released(strings.NewReader(told)); got != want {
			t.Errorf("told %q: released %v", told, got)
		}
	}
}

func TestUnits(t *testing.T) {
	for s, want := range map[string]time.Duration{"7d": 7 * 24 * time.Hour, "36h": 36 * time.Hour, "1m": time.Minute} {
		if got, err := days(s); got != want || err != nil {
			t.Errorf("%s is %s (%v)", s, got, err)
		}
	}
	for s, want := range map[string]int64{"5": 5, "1K": 1024, "1KiB": 1024, "20GiB": 20 << 30, "3 TiB": 3 << 40} {
		if got, err := byteSize(s); got != want || err != nil {
			t.Errorf("%s is %d (%v)", s, got, err)
		}
	}
	for _, s := range []string{"", "-1", "0", "x", "1.5GiB", "9999999999999T", "KiB"} {
		if got, err := byteSize(s); err == nil {
			t.Errorf("%q is %d", s, got)
		}
		if got, err := days(s); err == nil {
			t.Errorf("%q is %s", s, got)
		}
	}
}
