// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// First words of the lines that the intruders print.
const (
	BreachLine = "breach" // followed by what an intruder got and must not get
	DialedLine = "dialed" // followed by a vsock address and the result
	SpyingLine = "spying" // the spy has started
)

// intruder counts while child processes imitate the guest agent's exec helper:
// name, arguments and descriptors. Each has descriptors of its own in place of
// the exec's, and watches them for data.
type intruder struct {
	n     int
	found chan string
}

const (
	posers   = 4
	helper   = api.HelperPath // the path that the helper is started by
	statusFD = 200            // where the helper has the pipe that the agent writes to
)

func (i *intruder) pose() error {
	i.found = make(chan string, 16)
	for n := range posers {
		read, write, err := os.Pipe()
		if err != nil {
			return err
		}
		cmd := exec.Command(Path)
		cmd.Args = []string{helper, "exec", fmt.Sprintf("%026d", n)} // a token has 26 characters
		cmd.Stdin, cmd.Stdout, cmd.Stderr = read, write, write
		if err := cmd.Start(); err != nil {
			return err
		}
		write.Close()
		go i.listen(read)
	}
	return nil
}

func (i *intruder) listen(r io.Reader) {
	data := make([]byte, 100)
	for {
		n, err := r.Read(data)
		if n > 0 {
			i.found <- fmt.Sprintf("a poser got %q", data[:n])
		}
		if err != nil {
			i.found <- fmt.Sprintf("a poser has ended: %v", err)
			return
		}
	}
}

func (i *intruder) round(w io.Writer) error {
	select {
	case what := <-i.found:
		return errors.New(BreachLine + " " + what)
	default:
	}
	i.n++
	_, err := fmt.Fprintf(w, "round %d\n", i.n)
	return err
}

// poser is a child of intruder. It copies what arrives at its descriptors to
// its stdout, which the intruder reads.
func poser() error {
	if err := os.WriteFile("/proc/self/comm", []byte("kata-checkpoint-agent"), 0); err != nil {
		return err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	if err := unix.Dup3(int(write.Fd()), statusFD, 0); err != nil {
		return os.NewSyscallError("dup3", err)
	}
	_, err = io.Copy(os.Stdout, read)
	return err
}

// dialAgent tries to call the guest agent, and prints the result for each
// address.
func dialAgent(w io.Writer, port uint) error {
	// Loopback, the host, and the CID that Kata gives to guests with hybrid
	// vsock.
	for _, cid := range []uint32{vsock.Local, vsock.Host, 3} {
		if _, err := fmt.Fprintf(w, "%s %d:%d %s\n", DialedLine, cid, port, call(cid, uint32(port))); err != nil {
			return err
		}
	}
	// A process that binds the host's CID would pass for the host.
	outcome := "taken"
	if err := bind(vsock.Host, unix.VMADDR_PORT_ANY); err != nil {
		outcome = "refused: " + err.Error()
	}
	if _, err := fmt.Fprintf(w, "%s the host's number %s\n", DialedLine, outcome); err != nil {
		return err
	}
	outcome = "taken"
	if err := bind(unix.VMADDR_CID_ANY, uint32(port)); err != nil {
		outcome = "refused: " + err.Error()
	}
	_, err := fmt.Fprintf(w, "%s the agent's port %s\n", DialedLine, outcome)
	return err
}

// call reports how far a call got.
func call(cid, port uint32) string {
	conn, err := vsock.Dial(cid, port, nil)
	if err != nil {
		return "refused: " + err.Error()
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err = api.NewAgentClient(client).Info(ctx, &api.InfoRequest{}); err != nil {
		return "connected and refused: " + err.Error()
	}
	return "served"
}

func bind(cid, port uint32) error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrVM{CID: cid, Port: port}))
}

// spy inspects every new process in search of one that still is a copy of the
// agent, with the agent's memory and descriptors.
func spy(w io.Writer) error {
	if _, err := fmt.Fprintln(w, SpyingLine); err != nil {
		return err
	}
	told := make(map[string]bool)
	for {
		names, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		for _, process := range names {
			exe, err := os.Readlink(process + "/exe")
			if err != nil || !strings.Contains(exe, "kata-checkpoint") || told[process] {
				continue
			}
			told[process] = true
			files, _ := os.ReadDir(process + "/fd")
			if _, err := fmt.Fprintln(w, BreachLine, "process", filepath.Base(process), "is", strconv.Quote(exe), "with", len(files), "descriptors"); err != nil {
				return err
			}
		}
	}
}
