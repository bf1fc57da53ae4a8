// SPDX-License-Identifier: Apache-2.0

// nri-runtime is the runtime side of NRI without containerd: NRI's own package
// adaptation, with plugins that it starts and plugins that connect. Package
// parts builds it with the NRI version of each containerd release, and the
// plugin's tests run it.
//
// It is a single file that imports nothing from this project, because it is
// built in the modules of those releases.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
)

// request is a line of stdin: a container that the CRI is about to create.
type request struct {
	Pod       *api.PodSandbox
	Container *api.Container
}

// response is the line of stdout that answers it: the combined adjustment of
// all plugins.
type response struct {
	Adjust *api.ContainerAdjustment
	Error  string
}

func main() {
	dir := flag.String("dir", "", "`directory` with the socket, nri.sock, and the plugins to start, plugins/NN-NAME")
	containerd := flag.String("containerd", "", "`version` of containerd to give to plugins")
	flag.Parse()
	if err := run(*dir, *containerd, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "nri-runtime:", err)
		os.Exit(1)
	}
}

func run(dir, containerd string, in io.Reader, out io.Writer) error {
	// A container exists already, as after a restart of containerd.
	pods := []*api.PodSandbox{{Id: "earlier", RuntimeHandler: "kata-checkpoint"}}
	containers := []*api.Container{{Id: "earlier-c", PodSandboxId: "earlier"}}
	synchronize := func(ctx context.Context, callback adaptation.SyncCB) error {
		updates, err := callback(ctx, pods, containers)
		if len(updates) > 0 {
			err = errors.Join(err, errors.New("a plugin wants to update an existing container"))
		}
		return err
	}
	update := func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
		return nil, errors.New("a plugin wants to update a container")
	}
	runtime, err := adaptation.New("containerd", containerd, synchronize, update,
		adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")))
	if err != nil {
		return err
	}
	if err := runtime.Start(); err != nil {
		return err
	}
	defer runtime.Stop()

	lines, answers := bufio.NewScanner(in), json.NewEncoder(out)
	for lines.Scan() {
		var req request
		if err := json.Unmarshal(lines.Bytes(), &req); err != nil {
			return err
		}
		var answer response
		created, err := runtime.CreateContainer(context.Background(), &api.CreateContainerRequest{Pod: req.Pod, Container: req.Container})
		if err != nil {
			answer.Error = err.Error()
		}
		answer.Adjust = created.GetAdjust()
		if err := answers.Encode(answer); err != nil {
			return err
		}
	}
	return lines.Err()
}
