// SPDX-License-Identifier: Apache-2.0

// Package workload has the programs that run in containers under test. Each
// keeps state in several places, keeps checking that all of it agrees, and
// exits with an error if it does not: what a checkpoint lost or a restore did
// twice shows in its output, whatever the implementation.
//
// The output is one line of words for each round; callers parse it with
// [Ticks], [Rounds] and [Boots].
package workload

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// Path is the program's path in the container image.
const Path = "/bin/workload"

const usage = `usage: workload PROGRAM [OPTION...]
  counter             count in memory, in a file and in /dev/shm
  files               keep files open: on a volume (also mapped), on the root file system, in /dev/shm, and an unlinked one
  memory              verify checksums of random memory
  pulse               print the longest time between two looks at the clock, and write memory
  slots               count in a file of /dev/shm that other processes have mapped as well
  obedient            count, exit on SIGTERM, and obey commands in a file
  terminal            answer what is typed at the terminal
  relay               answer over TCP, also by asking other servers
  caller              count over a connection to a TCP server
  own-address         serve and count with sockets that are bound to the container's own address
  lock                count while holding a file lock
  io-uring            count while holding an io_uring
  peer                count in step with a peer over a unix socket
  intruder            count while child processes imitate the guest agent's exec helper
  dial-agent          try to call the guest agent
  spy                 look for copies of the guest agent
  hostile             do in the guest's exchange directory what no agent does
  limit               set how many files another process may open
  tree                use one of each kind of kernel object that processes hold
  idle                do nothing
  first-instruction   print the mounts and files that exist at the start`

// program is a program that was set up and runs until a check fails.
type program interface {
	// round does one step and verifies all state.
	round(w io.Writer) error
}

// Main runs the program that the arguments name. It returns with an error or
// when the program is done.
func Main(args []string, w io.Writer) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	name, args := args[0], args[1:]
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	every := flags.Duration("every", 100*time.Millisecond, "time between rounds")
	connected := flags.Bool("loopback", false, "keep TCP connections to child processes, and use one in each round")
	lean := flags.Bool("lean", false, "return unused memory to the kernel in each round")
	var setup func() (program, error)
	switch name {
	case "counter":
		c := counter{}
		flags.StringVar(&c.file, "file", "/var/tmp/count", "`file` of the root file system")
		flags.StringVar(&c.shm, "shm", "/dev/shm/count", "`file` of /dev/shm")
		setup = func() (program, error) { return &c, c.reset() }
	case "files":
		o := openFiles{}
		flags.StringVar(&o.volume, "volume", "/data/records", "`file` of a volume")
		flags.StringVar(&o.root, "root", "/var/tmp/records", "`file` of the root file system")
		flags.StringVar(&o.shm, "shm", "/dev/shm/records", "`file` of /dev/shm")
		flags.StringVar(&o.deleted, "deleted", "/var/tmp/deleted", "`file` that is removed once it is open")
		flags.StringVar(&o.mapped, "mapped", "/data/mapped", "`file` of the volume that is mapped")
		flags.Func("constant", "`file` that is read only and does not change; may be given again", func(path string) error {
			o.constant = append(o.constant, path)
			return nil
		})
		setup = func() (program, error) { return &o, o.open() }
	case "memory":
		m := memory{}
		flags.IntVar(&m.mib, "mib", 64, "`MiB` of random memory")
		flags.IntVar(&m.shmMiB, "shm-mib", 16, "`MiB` of random data in /dev/shm")
		flags.StringVar(&m.shm, "shm", "/dev/shm/random", "`file` of /dev/shm")
		setup = func() (program, error) { return &m, m.fill() }
	case "pulse":
		p := pulse{}
		flags.IntVar(&p.mib, "mib", 16, "`MiB` of memory")
		flags.Float64Var(&p.percent, "percent", 0, "`percent` of the memory to write each second")
		setup = func() (program, error) {
			p.begin()
			return &p, nil
		}
	case "slots":
		l := slots{}
		flags.StringVar(&l.shared, "shared", "/dev/shm/slots", "`file` of /dev/shm for all")
		flags.StringVar(&l.own, "own", "/dev/shm/own", "`file` of /dev/shm of its own")
		flags.IntVar(&l.slot, "slot", 0, "`number` of its slot")
		setup = func() (program, error) { return &l, l.open() }
	case "obedient":
		o := obedient{stderr: os.Stderr, exit: os.Exit}
		flags.StringVar(&o.command, "command", "/var/tmp/command", "`file` for commands; write it under another name and rename it")
		setup = func() (program, error) {
			o.listen()
			return &o, nil
		}
	case "terminal":
		t := terminal{exit: os.Exit}
		setup = func() (program, error) {
			t.open()
			return &t, nil
		}
	case "relay":
		r := relay{}
		flags.StringVar(&r.address, "listen", ":8080", "`address` to listen on")
		setup = func() (program, error) { return &r, r.listen() }
	case "caller":
		c := caller{}
		flags.StringVar(&c.address, "server", "", "`address` of a server that sends every line back")
		setup = func() (program, error) { return &c, c.connect() }
	case "own-address":
		o := ownAddress{}
		flags.StringVar(&o.server, "server", "", "`address` of a UDP server that sends every datagram back")
		setup = func() (program, error) { return &o, o.open() }
	case "lock":
		l := lock{}
		flags.StringVar(&l.path, "file", "/var/tmp/locked", "`file` to lock")
		setup = func() (program, error) { return &l, l.take() }
	case "io-uring":
		u := ioUring{}
		setup = func() (program, error) { return &u, u.open() }
	case "peer":
		p := peer{}
		flags.StringVar(&p.socket, "socket", "peer", "`name` of an abstract unix socket")
		flags.BoolVar(&p.listen, "listen", false, "wait for the other end")
		setup = func() (program, error) { return &p, p.connect() }
	case "intruder":
		i := intruder{}
		setup = func() (program, error) { return &i, i.pose() }
	case "exec":
		return poser()
	case "dial-agent":
		port := flags.Uint("port", api.DefaultPort, "vsock `port`")
		if err := flags.Parse(args); err != nil {
			return err
		}
		return dialAgent(w, *port)
	case "spy":
		return spy(w)
	case "limit":
		pid := flags.Int("pid", 0, "`process` to limit")
		files := flags.Uint64("files", 0, "`number` of files, its soft limit")
		if err := flags.Parse(args); err != nil {
			return err
		}
		return limitFiles(*pid, *files)
	case "hostile":
		h := hostile{}
		flags.StringVar(&h.dir, "dir", "", "exchange `directory`")
		flags.StringVar(&h.what, "do", "write", "`deed`")
		flags.IntVar(&h.n, "n", 1000, "`number` of files or levels, MiB, or size of a hole")
		flags.DurationVar(&h.limit, "limit", time.Minute, "`time` for it")
		if err := flags.Parse(args); err != nil {
			return err
		}
		return h.run(w)
	case "tree":
		t := tree{}
		flags.StringVar(&t.dir, "dir", "/var/tmp", "`directory` for files")
		flags.StringVar(&t.watch, "watch", "/run/watched", "`directory` in which files come and go")
		setup = func() (program, error) { return &t, t.setup() }
	case "tree-child":
		return treeChild()
	case "echo":
		return echoOnce()
	case "half-closed":
		return halfClosedChild()
	case "idle":
		setup = func() (program, error) { return idle{}, nil }
	case "first-instruction":
		if err := firstInstruction(w); err != nil {
			return err
		}
		setup = func() (program, error) { return idle{}, nil }
	default:
		return fmt.Errorf("unknown program %q\n%s", name, usage)
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	p, err := setup()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if *connected {
		l := &loopback{program: p}
		if err := l.open(); err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		p = l
	}
	boot := &boot{path: "/proc/sys/kernel/random/boot_id"}
	ticker := time.NewTicker(*every)
	defer ticker.Stop()
	for ; ; <-ticker.C {
		if err := boot.round(w); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := p.round(w); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if *lean {
			debug.FreeOSMemory()
		}
	}
}

type idle struct{}

func (idle) round(io.Writer) error { return nil }

// boot prints the kernel's boot id, at the start and whenever it has changed. A
// container whose /proc is unmounted later keeps the one that it has printed.
type boot struct {
	path, id string
}

func (b *boot) round(w io.Writer) error {
	data, err := os.ReadFile(b.path)
	if b.id != "" && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	id := strings.TrimSpace(string(data))
	if id == b.id {
		return nil
	}
	b.id = id
	_, err = fmt.Fprintln(w, "boot", id)
	return err
}
