// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

func TestAttributeTellsContainersApart(t *testing.T) {
	web := &Process{PID: 10, PIDs: []int{10, 1}, Name: "web", Mappings: []Mapping{{Path: "/SYSV0000002a (deleted)", Inode: 3}, {Path: "/lib/x", Inode: 4}}}
	db := &Process{PID: 20, PIDs: []int{20, 1}, Name: "db", Mappings: []Mapping{{Path: "/SYSV00000000 (deleted)", Inode: 5}}}
	segment := func(id int, pids ...int) ipcObject { return ipcObject{kind: sharedMemory, id: id, key: 42, pids: pids} }
	for name, tc := range map[string]struct {
		objects []ipcObject
		sharing []*Process
		own     bool
		refused []string
	}{
		"no objects":                       {sharing: []*Process{db}},
		"alone, whoever made it":           {objects: []ipcObject{segment(9, 999)}, own: true},
		"attached":                         {objects: []ipcObject{segment(3)}, sharing: []*Process{db}, own: true},
		"made and detached":                {objects: []ipcObject{segment(7, 10)}, sharing: []*Process{db}, own: true},
		"a semaphore set":                  {objects: []ipcObject{{kind: semaphores, id: 5, pids: []int{10}}}, sharing: []*Process{db}, own: true},
		"a file's inode is not an id":      {objects: []ipcObject{segment(4, 20)}, sharing: []*Process{db}},
		"another container's":              {objects: []ipcObject{segment(5)}, sharing: []*Process{db}},
		"a set with the id of a segment":   {objects: []ipcObject{{kind: semaphores, id: 3, pids: []int{20}}}, sharing: []*Process{db}},
		"used by both":                     {objects: []ipcObject{segment(3, 20)}, sharing: []*Process{db}, refused: []string{"web (pid 1) uses the System V shared memory segment 3 (key 0x2a) together with the process db"}},
		"one for each":                     {objects: []ipcObject{segment(3), segment(5)}, sharing: []*Process{db}, own: true, refused: []string{"pods of their own"}},
		"whose processes have both exited": {objects: []ipcObject{segment(8, 999)}, sharing: []*Process{db}, refused: []string{"the container shares its pod's IPC namespace", "segment 8", "ipcrm"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := &Container{Root: web, Processes: []*Process{web}}
			own, findings := c.attribute(tc.objects, tc.sharing)
			if own != tc.own {
				t.Errorf("own = %v, want %v", own, tc.own)
			}
			err := Refusal(findings)
			if (err != nil) != (len(tc.refused) > 0) {
				t.Fatalf("refusal: %v", err)
			}
			for _, text := range tc.refused {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q does not contain %q", err, text)
				}
			}
		})
	}
}

func TestParseSysV(t *testing.T) {
	titles := strings.Fields("key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime rss swap")
	got, err := parseSysV(titles, strings.Fields("-1 98306 600 4096 4711 0 1 0 0 0 0 1 0 1 4096 0"), sharedMemory, []string{"cpid", "lpid"})
	if err != nil {
		t.Fatal(err)
	}
	want := ipcObject{kind: sharedMemory, id: 98306, key: 0xffffffff, pids: []int{4711}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(ipcObject{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, line := range []string{"", "1 2", "x 98306 600 4096 4711 0 1 0 0 0 0 1 0 1 4096 0"} {
		if o, err := parseSysV(titles, strings.Fields(line), sharedMemory, nil); err == nil {
			t.Errorf("%q is %v, without an error", line, o)
		}
	}
}

// In an IPC namespace of its own, each kind of object is seen, with those that
// used it, and a message queue, whether or not it is open.
func TestIPCObjectsOfANamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes an IPC namespace: only as root")
	}
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWIPC}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	root := cmd.Process.Pid
	if objects, queues, _, err := ipcObjects(root); err != nil || len(objects) > 0 || len(queues) > 0 {
		t.Fatalf("a new namespace has %v and %v, error %v", objects, queues, err)
	}
	queue := -1
	err := thread.Do(func() error {
		if err := thread.Enter(root, "ipc"); err != nil {
			return err
		}
		id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, unix.IPC_CREAT|0o600)
		if err != nil {
			return err
		}
		if _, err := unix.SysvShmAttach(id, 0, 0); err != nil { // notes the last user
			return err
		}
		set, _, errno := unix.Syscall(unix.SYS_SEMGET, 0x2a, 2, unix.IPC_CREAT|0o600)
		if errno != 0 {
			return os.NewSyscallError("semget", errno)
		}
		const setValue = 16 // SETVAL of linux/sem.h
		if _, _, errno := unix.Syscall6(unix.SYS_SEMCTL, set, 1, setValue, 1, 0, 0); errno != 0 {
			return os.NewSyscallError("semctl", errno)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MSGGET, 0x2b, unix.IPC_CREAT|0o600, 0); errno != 0 {
			return os.NewSyscallError("msgget", errno)
		}
		queue, err = makeQueue("case")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(queue)
	objects, queues, device, err := ipcObjects(root)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, o := range objects {
		kinds = append(kinds, o.kind)
		if o.kind != messages && !slices.Contains(o.pids, os.Getpid()) {
			t.Errorf("%v was used by %v, and not by %d", o, o.pids, os.Getpid())
		}
	}
	if want := []string{sharedMemory, semaphores, messages}; !slices.Equal(kinds, want) {
		t.Errorf("the namespace has %v, not %v", kinds, want)
	}
	if len(queues) != 1 || queues["/case"] == 0 {
		t.Errorf("the namespace has the queues %v", queues)
	}
	self := processes(t, os.Getpid())[0]
	c := &Container{Root: self, Processes: []*Process{self}}
	if open := c.openQueues(self, device); !slices.Equal(open, []openQueue{{"/case", queues["/case"]}}) {
		t.Errorf("this process has the queues %v open", open)
	}
	if open := c.openQueues(self, device+1); len(open) > 0 {
		t.Errorf("files of another device are taken for queues: %v", open)
	}
	if err := Refusal(c.queues(queues, device, nil)); err == nil || !strings.Contains(err.Error(), "has the POSIX message queue /case open") {
		t.Errorf("an open queue is refused as %v", err)
	}
	other := &Container{Root: &Process{PIDs: []int{1}}}
	if err := Refusal(other.queues(queues, device, nil)); err == nil || !strings.Contains(err.Error(), "the container has the POSIX message queue /case") {
		t.Errorf("a queue that nobody has open is refused as %v", err)
	}
	if findings := other.queues(queues, device, []*Process{self}); len(findings) > 0 {
		t.Errorf("the queue of another container is refused: %v", findings)
	}

	// One that was removed is open still.
	must(t, thread.Do(func() error {
		if err := thread.Enter(root, "ipc"); err != nil {
			return err
		}
		return removeQueue("case")
	}))
	c = look(t, os.Getpid())
	_, queues, device, err = ipcObjects(root)
	if err != nil || len(queues) > 0 {
		t.Fatalf("queues %v, error %v", queues, err)
	}
	if err := Refusal(c.queues(queues, device, nil)); err == nil || !strings.Contains(err.Error(), "has the POSIX message queue /case open") {
		t.Errorf("an open queue without a name is refused as %v", err)
	}
}

// makeQueue is mq_open(3) with O_CREAT, without the slash that it leaves out.
func makeQueue(name string) (int, error) {
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	fd, _, errno := unix.Syscall6(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(path)), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600, 0, 0, 0)
	if errno != 0 {
		return -1, os.NewSyscallError("mq_open", errno)
	}
	return int(fd), nil
}

// removeQueue is mq_unlink(3), without the slash that it leaves out.
func removeQueue(name string) error {
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(path)), 0, 0); errno != 0 {
		return os.NewSyscallError("mq_unlink", errno)
	}
	return nil
}
