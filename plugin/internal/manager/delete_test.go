// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

const testID = "one"

// deletion is a container that is to be deleted, and what another of its name
// would have in the same places.
type deletion struct {
	*testing.T
	dir, state string
	i          *Invocation
	daemon     *exec.Cmd // of the other one
}

func newDeletion(t *testing.T) *deletion {
	t.Helper()
	d := &deletion{T: t, dir: t.TempDir()}
	d.state = filepath.Join(d.dir, "state")
	d.i = &Invocation{
		Args: []string{"delete"}, Namespace: "ns", ID: testID, Bundle: filepath.Join(d.dir, "bundles", testID), SocketDir: filepath.Join(d.dir, "s"),
	}
	d.make(0)
	t.Chdir(d.i.Bundle)
	return d
}

// make makes a bundle and what is named after its container.
func (d *deletion) make(pid int) {
	d.Helper()
	socket := d.i.socketPath(testID)
	for _, dir := range []string{d.i.Bundle, adjust.ExchangeDir(d.state, "ns", testID), filepath.Dir(socket)} {
		d.check(os.MkdirAll(dir, 0o755))
	}
	r := &bundle.Record{
		Sandbox: testID, StateDir: d.state, DownstreamShim: filepath.Join(d.dir, "kata"), Address: "unix://" + socket, Events: socket + ".events", PID: pid,
	}
	if pid != 0 {
		var err error
		r.StartTime, err = procfs.StartTime(pid)
		d.check(err)
	}
	d.check(r.Write(d.i.Bundle))
	for _, path := range []string{socket, r.Events} {
		d.check(os.WriteFile(path, nil, 0o600))
	}
}

// replace has containerd remove the bundle and another container get the name.
func (d *deletion) replace() {
	d.Helper()
	hidden := filepath.Join(filepath.Dir(d.i.Bundle), "."+testID)
	d.check(os.Rename(d.i.Bundle, hidden))
	d.check(os.RemoveAll(hidden))
	d.daemon = exec.Command("sleep", "600")
	d.check(d.daemon.Start())
	d.Cleanup(func() {
		_ = d.daemon.Process.Kill()
		_ = d.daemon.Wait()
	})
	d.make(d.daemon.Process.Pid)
}

// kata makes the script that stands for Kata's binary. The answer is
// DeleteResponse{exit_status: 9}.
func (d *deletion) kata(script string) {
	d.Helper()
	d.check(os.WriteFile(filepath.Join(d.dir, "kata"), []byte("#!/bin/sh\n"+script+"\nprintf '\\020\\011'\n"), 0o755))
}

func (d *deletion) check(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

// stands checks whether what is named after the container is there.
func (d *deletion) stands(want bool) {
	d.Helper()
	socket := d.i.socketPath(testID)
	for _, path := range []string{adjust.ExchangeDir(d.state, "ns", testID), socket, socket + ".events"} {
		if _, err := os.Stat(path); (err == nil) != want {
			d.Errorf("%s: %v", path, err)
		}
	}
}

func TestDeleteRemovesWhatIsTheContainers(t *testing.T) {
	d := newDeletion(t)
	d.kata("")
	answer, err := Delete(context.Background(), d.i)
	if err != nil || len(answer) == 0 {
		t.Errorf("answer %q, %v", answer, err)
	}
	d.stands(false)
}

// containerd gives a delete 5 s, which may be longer than its caller waits:
// then the name is free before the delete has begun, or in its middle.
func TestDeleteLeavesAnotherContainerOfTheNameAlone(t *testing.T) {
	t.Run("there before", func(t *testing.T) {
		d := newDeletion(t)
		called := filepath.Join(d.dir, "called")
		d.kata("touch " + called)
		d.replace()
		d.refused()
		if _, err := os.Stat(called); err == nil {
			t.Error("Kata's delete ran on the other container")
		}
	})
	t.Run("there while Kata's part runs", func(t *testing.T) {
		d := newDeletion(t)
		begun, done := filepath.Join(d.dir, "begun"), filepath.Join(d.dir, "done")
		for _, pipe := range []string{begun, done} {
			d.check(exec.Command("mkfifo", pipe).Run())
		}
		d.kata(fmt.Sprintf("echo >%s; read -r _ <%s", begun, done))
		ended := make(chan error)
		go func() {
			if _, err := os.ReadFile(begun); err != nil {
				ended <- err
				return
			}
			d.replace()
			ended <- os.WriteFile(done, []byte("\n"), 0)
		}()
		d.refused()
		d.check(<-ended)
	})
}

// refused has the container deleted, which must leave the other one as it is.
func (d *deletion) refused() {
	d.Helper()
	if answer, err := Delete(context.Background(), d.i); !errors.Is(err, ErrReplaced) {
		d.Errorf("answer %q, %v", answer, err)
	}
	d.stands(true)
	// A child that has ended is one until it is waited for.
	if pid, err := unix.Wait4(d.daemon.Process.Pid, nil, unix.WNOHANG, nil); pid != 0 || err != nil {
		d.Errorf("the other container's daemon has ended (%v)", err)
	}
}
