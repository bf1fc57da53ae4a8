// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestCgroupPath(t *testing.T) {
	for fromHost, want := range map[string]string{
		"":           "/c1",
		"/default/c": "/default/c",
		"kubepods-besteffort-pod1.slice:cri-containerd:c1": "/kubepods-besteffort-pod1.slice/cri-containerd/c1",
	} {
		if got := cgroupPath(fromHost, "c1"); got != want {
			t.Errorf("%q: %s, want %s", fromHost, got, want)
		}
	}
}

func TestFinishFitsASpecificationIntoTheSandbox(t *testing.T) {
	spec := &specs.Spec{
		Hostname: "h",
		Root:     &specs.Root{Path: "/share/c1/rootfs", Readonly: true},
		Process:  &specs.Process{Terminal: true, ConsoleSize: &specs.Box{}},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
		},
	}
	finish(spec, surroundings{cid: "c1", ipc: "/ns/ipc", uts: "/ns/uts", hooks: []string{"/hooks/prestart/a"}, self: "/usr/bin/kata-agent", annotate: true})
	want := &specs.Spec{
		Root:    &specs.Root{Path: "/run/kata-containers/c1/rootfs", Readonly: true},
		Process: &specs.Process{},
		Linux: &specs.Linux{
			CgroupsPath: "/c1",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.IPCNamespace, Path: "/ns/ipc"}, {Type: specs.UTSNamespace, Path: "/ns/uts"}, {Type: specs.MountNamespace},
				{Type: specs.PIDNamespace}, {Type: specs.CgroupNamespace},
			},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}},
		},
		Hooks: &specs.Hooks{
			//nolint:staticcheck // what the guest's hooks are given to runc as
			Prestart: []specs.Hook{{Path: "/usr/bin/kata-agent", Args: []string{"kata-agent", HookMode, annotateFlag, "created", "/hooks/prestart/a"}}},
		},
	}
	if diff := cmp.Diff(want, spec); diff != "" {
		t.Error(diff)
	}
}

func TestHooksAreFilesThatCanBeExecuted(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "prestart")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"20-b": 0o755, "10-a": 0o755, "30-text": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("10-a", filepath.Join(dir, "40-link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "50-dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{filepath.Join(dir, "10-a"), filepath.Join(dir, "20-b")}, findHooks(root, "prestart")); diff != "" {
		t.Error(diff)
	}
	if got := findHooks(root, "poststop"); got != nil {
		t.Errorf("found %v where there is nothing", got)
	}
}

func TestSignalsThatAProcessHeeds(t *testing.T) {
	for line, want := range map[string]bool{
		"SigCgt:\t0000000000004000": true,
		"SigBlk:\t0000000000004000": true,
		"SigIgn:\t0000000000004000": true,
		"SigPnd:\t0000000000004000": false,
		"SigCgt:\t0000000000000200": false,
		"Name:\tsleep":              false,
	} {
		if got := inMask(line, unix.SIGTERM); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}

func TestCapabilitiesByName(t *testing.T) {
	got, err := parseCapabilities(&specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", "CAP_KILL"}, Permitted: []string{"CAP_CHECKPOINT_RESTORE"}})
	if err != nil || got.bounding != 1|1<<unix.CAP_KILL || got.permitted != 1<<unix.CAP_CHECKPOINT_RESTORE {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := parseCapabilities(&specs.LinuxCapabilities{Bounding: []string{"CAP_NONE"}}); err == nil {
		t.Error("an unknown capability was taken")
	}
}

// theReaper takes all children of the tests away: there is one, and nothing
// here may wait for a child in another way.
var theReaper = sync.OnceValue(func() *reaper {
	r := newReaper()
	go r.run()
	return r
})

func TestAProcessMayEndBeforeItsPidIsKnown(t *testing.T) {
	early, err := os.StartProcess("/bin/sh", []string{"sh", "-c", "exit 3"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	r := theReaper()
	for deadline := time.Now().Add(10 * time.Second); unix.Kill(early.Pid, 0) == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	if got := <-r.watch(early.Pid); got != 3 {
		t.Errorf("exit status %d, want 3", got)
	}
	status, err := r.start(exec.Command("/bin/sh", "-c", "kill -9 $$"))
	if err != nil {
		t.Fatal(err)
	}
	if got := <-status; got != 137 {
		t.Errorf("exit status %d, want 137", got)
	}
	if err := r.runCommand(exec.Command("/bin/sh", "-c", "echo why; exit 1")); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("%v", err)
	}
}

func TestNetworkSettingsAreTheGuests(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, "net/ipv4/ip_unprivileged_port_start")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("1024"), 0o644); err != nil {
		t.Fatal(err)
	}
	sysctls := map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "kernel.shmmax": "1"}
	if err := setSysctls(root, sysctls, "net."); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"kernel.shmmax": "1"}, sysctls); diff != "" {
		t.Errorf("left to runc: -want +got:\n%s", diff)
	}
	if have, err := os.ReadFile(path); err != nil || string(have) != "0" {
		t.Errorf("it is %q (%v)", have, err)
	}
	if err := setSysctls(root, map[string]string{"net.none": "1"}, "net."); err == nil {
		t.Error("one that does not exist is no error")
	}
}
