// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hostspec"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

const (
	runtimeName = "io.containerd.kata.v2"
	// kataVersion is the Kata release that is imitated.
	kataVersion = "4.1.0"
)

// flags are containerd's, with one or two dashes.
type flags struct {
	namespace, id, address, publish, socket, bundle string
	debug, info, version                            bool
	action                                          string
}

func parse(args []string) (*flags, error) {
	var f flags
	set := flag.NewFlagSet("containerd-shim-kata-v2", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.StringVar(&f.namespace, "namespace", "", "namespace that owns the shim")
	set.StringVar(&f.id, "id", "", "id of the task")
	set.StringVar(&f.address, "address", "", "address of containerd's main socket")
	set.StringVar(&f.publish, "publish-binary", "", "binary to publish events with, unused")
	set.StringVar(&f.socket, "socket", "", "socket path to serve, unused")
	set.StringVar(&f.bundle, "bundle", "", "path of the bundle")
	set.BoolVar(&f.debug, "debug", false, "log more, unused")
	set.BoolVar(&f.info, "info", false, "print the runtime's description")
	set.BoolVar(&f.version, "version", false, "print the version")
	set.BoolVar(&f.version, "v", false, "print the version")
	if err := set.Parse(args); err != nil {
		return nil, err
	}
	f.action = set.Arg(0)
	return &f, nil
}

// check requires the flags that the respective shim requires.
func (f *flags) check(w way.Way) error {
	if f.namespace == "" {
		return errors.New("no -namespace")
	}
	if w == way.Go {
		return nil
	}
	if f.id == "" || f.publish == "" {
		return errors.New("no -id or no -publish-binary")
	}
	if f.action == "delete" && f.bundle == "" {
		return errors.New("no -bundle")
	}
	return nil
}

// Main is the binary's main. The Rust shim reports errors only on stderr: its
// exit status is 0 unless it panics.
func Main() {
	w, err := way.OfBinary(executable())
	if err == nil {
		err = run(w)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if w != way.Rust {
			os.Exit(1)
		}
	}
}

func executable() string {
	path, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return path
}

func run(w way.Way) error {
	f, err := parse(os.Args[1:])
	if err != nil {
		return err
	}
	// The Go shim looks for these two as its only argument.
	alone := len(os.Args) == 2 || w == way.Rust
	switch {
	case f.version && alone:
		language := "Golang"
		if w == way.Rust {
			language = "Rust"
		}
		fmt.Printf("Kata Containers containerd shim (%s): id: %q, version: %s, commit: stand-in\n", language, runtimeName, kataVersion)
		return nil
	case f.info && alone:
		return info(w)
	}
	if err := f.check(w); err != nil {
		return err
	}
	switch f.action {
	case "start":
		return start(w, f)
	case "delete":
		return remove(w, f)
	case "":
		return serve(w, f)
	}
	return fmt.Errorf("unknown action %q", f.action)
}

func info(w way.Way) error {
	description := &types.RuntimeInfo{Name: runtimeName, Version: &types.RuntimeVersion{Version: kataVersion}}
	if w == way.Rust {
		description.Annotations = map[string]string{"containerd.io/runtime-allow-mounts": "mkdir/*,format/*,erofs"}
	}
	return write(description)
}

func write(m proto.Message) error {
	raw, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(raw)
	return err
}

// sandboxOf reads the bundle in the working directory.
func sandboxOf(id string) (bundle string, kind hostspec.Kind, sandbox string, err error) {
	bundle, err = os.Getwd()
	if err != nil {
		return "", "", "", err
	}
	spec, err := hostspec.Load(bundle)
	if err != nil {
		return "", "", "", err
	}
	kind, sandbox, err = hostspec.Classify(id, spec.Annotations)
	return bundle, kind, sandbox, err
}
