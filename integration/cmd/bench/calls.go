package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

const (
	// cheapCalls is how often a call that starts nothing is made on either way, execCalls one that starts a process in the guest.
	cheapCalls = 1000
	execCalls  = 40
	// callBound is how many times the median of calls past the shim those through it may be.
	callBound = 1.10
)

// shimClient calls a shim's Task service, as containerd does.
type shimClient struct {
	task.TTRPCTaskService
	conn *ttrpc.Client
}

func dialShim(address string) (*shimClient, error) {
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		return nil, err
	}
	c := ttrpc.NewClient(conn)
	return &shimClient{task.NewTTRPCTaskClient(c), c}, nil
}

// shims connects to the shim under test, and past it to Kata's own, which has written its address into the bundle.
func (b *bench) shims(id string) (through, past *shimClient, err error) {
	bundle := filepath.Join(b.bed.Dir, "run/io.containerd.runtime.v2.task", testbed.Namespace, id)
	data, err := os.ReadFile(filepath.Join(bundle, "bootstrap.json"))
	if err != nil {
		return nil, nil, err
	}
	var bootstrap struct {
		Address string `json:"address"`
	}
	if err := json.Unmarshal(data, &bootstrap); err != nil {
		return nil, nil, err
	}
	if through, err = dialShim(bootstrap.Address); err != nil {
		return nil, nil, err
	}
	kata, err := os.ReadFile(filepath.Join(bundle, "address"))
	if err != nil {
		return nil, nil, err
	}
	past, err = dialShim(strings.TrimSpace(string(kata)))
	return through, past, err
}

// calls compares calls to a container through the shim with the same calls past it, in turns.
func (b *bench) calls(ctx context.Context) error {
	const id = "calls"
	run, err := b.start(ctx, id, "memory", "--mib", "1", "--shm-mib", "0", "--every", "10ms")
	if err != nil {
		return err
	}
	process, err := trueProcess(ctx, run)
	if err != nil {
		return err
	}
	through, past, err := b.shims(id)
	if err != nil {
		return err
	}
	defer through.conn.Close()
	defer past.conn.Close()
	ctx = namespaces.WithNamespace(ctx, testbed.Namespace)
	b.table.heading("calls through the shim, and past it to Kata's own")
	n := 0
	for _, call := range []struct {
		name  string
		times int
		do    func(*shimClient) (time.Duration, error)
	}{
		{"State", cheapCalls, timed(func(c *shimClient) error {
			_, err := c.State(ctx, &task.StateRequest{ID: id})
			return err
		})},
		{"Stats", cheapCalls, timed(func(c *shimClient) error {
			_, err := c.Stats(ctx, &task.StatsRequest{ID: id})
			return err
		})},
		{"Kill", cheapCalls, timed(func(c *shimClient) error {
			_, err := c.Kill(ctx, &task.KillRequest{ID: id, Signal: uint32(syscall.SIGWINCH)})
			return err
		})},
		{"Exec", execCalls, func(c *shimClient) (time.Duration, error) {
			n++
			return execOnce(ctx, c, id, fmt.Sprintf("exec-%d", n), process)
		}},
	} {
		var with, without []time.Duration
		for i := range call.times {
			order := []*shimClient{through, past}
			if i%2 == 1 {
				order[0], order[1] = order[1], order[0]
			}
			for _, c := range order {
				d, err := call.do(c)
				if err != nil {
					return fmt.Errorf("%s: %w", call.name, err)
				}
				if c == through {
					with = append(with, d)
				} else {
					without = append(without, d)
				}
			}
		}
		b.table.row(call.name, "%.3f ms through, %.3f ms past, %d each", milliseconds(median(with)), milliseconds(median(without)), call.times)
		b.table.bounded(call.name+" through over past", "%.2f", float64(median(with))/float64(median(without)), callBound)
	}
	return b.engine.Remove(ctx, id)
}

func timed(call func(*shimClient) error) func(*shimClient) (time.Duration, error) {
	return func(c *shimClient) (time.Duration, error) {
		start := time.Now()
		err := call(c)
		return time.Since(start), err
	}
}

// execOnce times the calls that an exec consists of; that the command runs in between is not counted.
func execOnce(ctx context.Context, c *shimClient, id, exec string, process typeurl.Any) (time.Duration, error) {
	start := time.Now()
	if _, err := c.Exec(ctx, &task.ExecProcessRequest{ID: id, ExecID: exec, Spec: typeurl.MarshalProto(process)}); err != nil {
		return 0, err
	}
	if _, err := c.Start(ctx, &task.StartRequest{ID: id, ExecID: exec}); err != nil {
		return 0, err
	}
	total := time.Since(start)
	if _, err := c.Wait(ctx, &task.WaitRequest{ID: id, ExecID: exec}); err != nil {
		return 0, err
	}
	start = time.Now()
	if _, err := c.Delete(ctx, &task.DeleteRequest{ID: id, ExecID: exec}); err != nil {
		return 0, err
	}
	return total + time.Since(start), nil
}

// trueProcess is a command that ends at once.
func trueProcess(ctx context.Context, run interface {
	Spec(context.Context) (*specs.Spec, error)
}) (typeurl.Any, error) {
	spec, err := run.Spec(ctx)
	if err != nil {
		return nil, err
	}
	process := *spec.Process
	process.Args, process.Terminal = []string{"/bin/true"}, false
	return typeurl.MarshalAny(&process)
}
