// SPDX-License-Identifier: Apache-2.0

// Package testfuse mounts file systems for tests that a process of its own
// serves, which a test may stop: whoever asks for one of its files then waits.
//
// The server is the test's own binary, started again, which serves before any
// test runs. It speaks FUSE 7.31 (linux/fuse.h) on a little-endian machine.
package testfuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Name is the name of the only file.
const Name = "file"

// Content is its content.
const Content = "hello"

// dirVariable is the server's mount point in its environment.
const dirVariable = "KATA_CHECKPOINT_TEST_FUSE"

func init() {
	if dir := os.Getenv(dirVariable); dir != "" {
		fmt.Fprintln(os.Stderr, serve(dir))
		os.Exit(1)
	}
}

// Mount mounts a file system on a directory until the test ends, and returns
// the process that serves it. Tests that cannot mount one are skipped.
func Mount(t *testing.T, dir string) *os.Process {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts a FUSE file system")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), dirVariable+"="+dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		_ = cmd.Process.Kill() // whoever waits for an answer gets an error
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, Name)); err == nil {
			return cmd.Process
		}
		if time.Now().After(deadline) {
			t.Fatal("the FUSE file system was not mounted")
		}
	}
}

// Stop stops the server, as a freezer does, until the test ends.
func Stop(t *testing.T, server *os.Process) {
	t.Helper()
	if err := server.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Signal(unix.SIGCONT) })
	// Until then, it may still take a request, for whose answer even a killed
	// process waits.
	if err := unix.Waitid(unix.P_PID, server.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
}

// Ends fails the test unless f returns soon.
func Ends(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Errorf("%s waits for the stopped server of a file system", what)
	}
}

// Operations of linux/fuse.h.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReleasedir  = 29
	opBatchForget = 42
)

const (
	rootNode = 1
	fileNode = 2
)

func serve(dir string) error {
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Mount("test", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse)); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	request := make([]byte, 1<<17)
	for {
		n, err := unix.Read(fuse, request)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		const header = 40
		op, unique, node := binary.LittleEndian.Uint32(request[4:]), request[8:16], binary.LittleEndian.Uint64(request[16:])
		if op == opForget || op == opBatchForget {
			continue
		}
		body, errno := answer(op, node, request[header:n])
		reply := binary.LittleEndian.AppendUint32(nil, uint32(16+len(body))) //nolint:gosec // small
		reply = binary.LittleEndian.AppendUint32(reply, -uint32(errno))      //nolint:gosec // small
		reply = append(append(reply, unique...), body...)
		if _, err := unix.Write(fuse, reply); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
}

func answer(op uint32, node uint64, request []byte) ([]byte, unix.Errno) {
	switch op {
	case opInit:
		out := make([]byte, 64)
		binary.LittleEndian.PutUint32(out, 7)
		binary.LittleEndian.PutUint32(out[4:], 31)
		binary.LittleEndian.PutUint32(out[8:], 4096)
		binary.LittleEndian.PutUint32(out[20:], 4096)
		return out, 0
	case opLookup:
		if node != rootNode || string(request[:len(request)-1]) != Name {
			return nil, unix.ENOENT
		}
		out := make([]byte, 40) // nothing is cached
		binary.LittleEndian.PutUint64(out, fileNode)
		return append(out, attributes(fileNode)...), 0
	case opGetattr:
		return append(make([]byte, 16), attributes(node)...), 0
	case opOpen, opOpendir:
		return make([]byte, 16), 0
	case opRead:
		if binary.LittleEndian.Uint64(request[8:]) > 0 {
			return nil, 0
		}
		return []byte(Content), 0
	case opFlush, opRelease, opReleasedir:
		return nil, 0
	}
	return nil, unix.ENOSYS
}

// attributes is a struct fuse_attr.
func attributes(node uint64) []byte {
	out := make([]byte, 88)
	binary.LittleEndian.PutUint64(out, node)
	mode := uint32(unix.S_IFDIR | 0o755)
	if node == fileNode {
		binary.LittleEndian.PutUint64(out[8:], uint64(len(Content)))
		mode = unix.S_IFREG | 0o666
	}
	binary.LittleEndian.PutUint32(out[60:], mode)
	binary.LittleEndian.PutUint32(out[64:], 1)
	return out
}
