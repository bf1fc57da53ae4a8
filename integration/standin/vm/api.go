// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The part of Cloud Hypervisor's configuration that a sandbox needs, with Cloud
// Hypervisor's names.
type vmConfig struct {
	CPUs    cpus    `json:"cpus"`
	Memory  memory  `json:"memory"`
	Payload payload `json:"payload"`
	FS      []fs    `json:"fs"`
	Vsock   vsock   `json:"vsock"`
	Serial  console `json:"serial"`
	Console console `json:"console"`
}

type cpus struct {
	Boot int32 `json:"boot_vcpus"`
	Max  int32 `json:"max_vcpus"`
}

type memory struct {
	Size   int64 `json:"size"`
	Shared bool  `json:"shared"`
}

type payload struct {
	Kernel    string `json:"kernel"`
	Cmdline   string `json:"cmdline"`
	Initramfs string `json:"initramfs"`
}

type fs struct {
	Tag       string `json:"tag"`
	Socket    string `json:"socket"`
	NumQueues int    `json:"num_queues"`
	QueueSize int    `json:"queue_size"`
}

type vsock struct {
	CID    int64  `json:"cid"`
	Socket string `json:"socket"`
}

type console struct {
	Mode string `json:"mode"`
}

// netConfig is the body of vm.add-net. The tap is passed as a descriptor.
type netConfig struct {
	MAC       string `json:"mac"`
	NumQueues int    `json:"num_queues"`
	QueueSize int    `json:"queue_size"`
}

// vmm is a client of the VMM's API socket.
type vmm struct {
	socket string
	client http.Client
}

func newVMM(socket string) *vmm {
	return &vmm{socket: socket, client: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}}
}

// call makes one request. Status codes other than 200 and 204 are errors, with
// the reason in the body.
func (v *vmm) call(ctx context.Context, method, name string, body any) error {
	request, err := newRequest(ctx, method, name, body)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	answer, err := v.client.Do(request)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return outcome(name, answer)
}

func newRequest(ctx context.Context, method, name string, body any) (*http.Request, error) {
	var content io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(raw)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost/api/v1/"+name, content)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/json")
	return request, nil
}

func outcome(name string, answer *http.Response) error {
	defer answer.Body.Close()
	if answer.StatusCode >= 300 {
		reason, _ := io.ReadAll(io.LimitReader(answer.Body, 4096))
		return fmt.Errorf("%s: %s: %s", name, answer.Status, bytes.TrimSpace(reason))
	}
	return nil
}

// addNet adds a network card to the VM: before the boot as part of the machine,
// afterwards as a hotplug.
func (v *vmm) addNet(ctx context.Context, c netConfig, tap *os.File) error {
	const name = "vm.add-net"
	request, err := newRequest(ctx, http.MethodPut, name, c)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var message bytes.Buffer
	if err := request.Write(&message); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: v.socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	// The descriptor is sent with the request's first byte.
	if _, _, err := conn.WriteMsgUnix(message.Bytes(), unix.UnixRights(int(tap.Fd())), nil); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), request)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return outcome(name, answer)
}

// waitFor pings until the VMM answers.
func (v *vmm) waitFor(ctx context.Context, gone <-chan struct{}) error {
	for {
		err := v.call(ctx, http.MethodGet, "vmm.ping", nil)
		if err == nil {
			return nil
		}
		select {
		case <-gone:
			return fmt.Errorf("the VMM is gone: %w", err)
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}
