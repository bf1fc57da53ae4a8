// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

const (
	// cheapCalls is the number of pairs an iteration of calls that start
	// nothing, execCalls that of calls that start a process in the guest.
	cheapCalls = 100
	execCalls  = 4
	// callBound is the bound of a call through the shim over one past it.
	callBound = 1.10
)

// shimClient calls a shim's task service, as containerd does.
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

// shims connects to the shim under test, and past it to Kata's own, which has
// written its address into the bundle.
func (s *bench) shims(id string) (through, past *shimClient, err error) {
	bundle := filepath.Join(s.bed.Dir, "run/io.containerd.runtime.v2.task", testbed.Namespace, id)
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

// BenchmarkCall compares calls to a container through the shim with the same
// calls to Kata's own, past it.
func BenchmarkCall(b *testing.B) {
	run(b, func(s *bench) error {
		const id = "calls"
		run, err := s.start(b.Context(), id, "memory", "--mib", "1", "--shm-mib", "0", "--every", "10ms")
		if err != nil {
			return err
		}
		process, err := trueProcess(b.Context(), run)
		if err != nil {
			return err
		}
		through, past, err := s.shims(id)
		if err != nil {
			return err
		}
		defer through.conn.Close()
		defer past.conn.Close()
		ctx := namespaces.WithNamespace(b.Context(), testbed.Namespace)
		execs := 0
		for _, call := range []struct {
			name  string
			pairs int
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
				execs++
				return execOnce(ctx, c, id, fmt.Sprintf("exec-%d", execs), process)
			}},
		} {
			b.Run(call.name, func(b *testing.B) {
				with, without, err := inTurns(b, call.pairs, func(_ int, second bool) (time.Duration, error) {
					if second {
						return call.do(past)
					}
					return call.do(through)
				})
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(median(with)), "ns/op")
				b.ReportMetric(milliseconds(median(without)), "past-ms")
				s.bounds.check(b, ratio(with, without), "through/past", callBound)
			})
		}
		return s.engine.Remove(b.Context(), id)
	})
}

// inTurns times two things in pairs, of which every other begins with the
// second: what else loads the machine changes, and affects both of a pair.
func inTurns(b *testing.B, pairs int, do func(pair int, second bool) (time.Duration, error)) (first, second []time.Duration, err error) {
	for n := 0; b.Loop(); {
		for range pairs {
			for _, isSecond := range []bool{n%2 == 1, n%2 == 0} {
				d, err := do(n, isSecond)
				if err != nil {
					return nil, nil, err
				}
				if isSecond {
					second = append(second, d)
				} else {
					first = append(first, d)
				}
			}
			n++
		}
	}
	return first, second, nil
}

func timed(call func(*shimClient) error) func(*shimClient) (time.Duration, error) {
	return func(c *shimClient) (time.Duration, error) {
		start := time.Now()
		err := call(c)
		return time.Since(start), err
	}
}

// execOnce times the calls of an exec, without the time in which the command
// runs.
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

// trueProcess is a command that exits at once.
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
