// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// qmpTimeout bounds one command: QEMU answers from its main loop, which a guest
// under TCG can delay on a loaded machine.
const qmpTimeout = time.Minute

// qmp is a connection to QEMU's monitor. Commands are serialized.
type qmp struct {
	mu    sync.Mutex
	conn  *net.UnixConn
	dec   *json.Decoder
	ready bool // capabilities are negotiated
}

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Event    string          `json:"event"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

func newQMP(conn *net.UnixConn) *qmp {
	return &qmp{conn: conn, dec: json.NewDecoder(conn)}
}

// execute runs one command. Files are passed along, as getfd requires.
func (q *qmp) execute(command string, arguments any, files ...*os.File) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if err := q.conn.SetDeadline(time.Now().Add(qmpTimeout)); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	if !q.ready {
		if err := q.exchange("qmp_capabilities", nil, nil); err != nil {
			return err
		}
		q.ready = true
	}
	return q.exchange(command, arguments, files)
}

func (q *qmp) exchange(command string, arguments any, files []*os.File) error {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = syscall.UnixRights(fds...)
	}
	if _, _, err := q.conn.WriteMsgUnix(append(request, '\n'), rights, nil); err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	for {
		var m qmpMessage
		if err := q.dec.Decode(&m); err != nil {
			return fmt.Errorf("qmp %s: %w", command, err)
		}
		switch {
		case m.Error != nil:
			return fmt.Errorf("qmp %s: %w", command, errors.New(m.Error.Desc))
		case m.Return != nil:
			return nil
		}
		// Skip the greeting and events.
	}
}

// plugNIC adds a network card to a running machine, in hotplug slot number
// slot. Card numbers continue those on the command line.
func (q *qmp) plugNIC(n netConfig, taps []*os.File, number, slot int) error {
	var names strings.Builder
	for i, tap := range taps {
		name := fmt.Sprintf("tap%d.%d", number, i)
		if err := q.execute("getfd", map[string]any{"fdname": name}, tap); err != nil {
			return err
		}
		if i > 0 {
			names.WriteString(":")
		}
		names.WriteString(name)
	}
	netdev := map[string]any{"type": "tap", "id": fmt.Sprintf("net%d", number)}
	device := map[string]any{
		"driver": "virtio-net-pci", "id": fmt.Sprintf("nic%d", number), "netdev": netdev["id"],
		"bus": fmt.Sprintf("slot%d", slot), "romfile": "",
	}
	if n.MAC != "" {
		device["mac"] = n.MAC
	}
	if len(taps) == 1 {
		netdev["fd"] = names.String()
	} else {
		netdev["fds"] = names.String()
		device["mq"], device["vectors"] = true, 2*len(taps)+2
	}
	if err := q.execute("netdev_add", netdev); err != nil {
		return err
	}
	return q.execute("device_add", device)
}
