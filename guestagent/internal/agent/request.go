// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"io"
	"net/netip"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// checkRequest checks what a request says of an image set as strictly as the
// host checks a manifest: parts of it become options of CRIU, which parses them.
func checkRequest(r *api.RestoreRequest) error {
	m := &imageset.Manifest{
		Options: imageset.Options{EmptyNamespaces: r.GetOptions().GetEmptyNamespaces()},
		Guest:   imageset.Guest{CPUFeatures: r.GetCpuFeatures()},
		Sockets: imageset.NewSockets(r.GetSockets()),
	}
	for _, e := range r.GetExternals() {
		m.Externals = append(m.Externals, imageset.External{Name: e.GetName(), Destination: e.GetDestination(), FSType: e.GetFstype()})
	}
	for _, s := range r.GetStdio() {
		m.Stdio = append(m.Stdio, imageset.Stdio{FD: s.GetFd(), Key: s.GetKey()})
	}
	for _, c := range r.GetConnections() {
		local, _ := netip.ParseAddrPort(c.GetLocal()) // the zero value is refused
		remote, _ := netip.ParseAddrPort(c.GetRemote())
		m.Connections = append(m.Connections, imageset.Connection{Local: local, Remote: remote})
	}
	for _, a := range r.GetAddresses() {
		addr, _ := netip.ParseAddr(a.GetAddress())
		m.Addresses = append(m.Addresses, imageset.Address{Interface: a.GetInterface(), Address: addr})
	}
	for _, f := range r.GetOpenFiles() {
		m.OpenFiles = append(m.OpenFiles, imageset.NewOpenFile(f.GetPath(), f.GetSize(), f.GetMayGrow()))
	}
	for _, a := range r.GetAttributes() {
		m.Attributes = append(m.Attributes, imageset.Attribute{PID: a.GetPid(), Thread: a.GetThread(), Name: a.GetName(), Value: a.GetValue()})
	}
	if err := m.CheckRestore(); err != nil {
		return errclass.Invalid(errcode.BadAgentRequest, "the request is invalid: %w", err)
	}
	return nil
}

// checkContents refuses an image set with other files than those that a container
// can have.
func checkContents(images string) error {
	if err := checkImages(images); err != nil {
		return err
	}
	return checkCredentials(images)
}

// maxImages bounds the number of files in an image set. The host has a bound of
// its own, max_image_files.
const maxImages = 1 << 20

// checkImages refuses a directory with anything but images that a container can
// have. CRIU opens by name whatever it has a use for.
func checkImages(images string) error {
	dir, err := os.Open(images)
	if err != nil {
		return err
	}
	defer dir.Close()
	for left := maxImages; ; {
		entries, err := dir.ReadDir(1024)
		for _, e := range entries {
			if !e.Type().IsRegular() || !imageset.IsImage(e.Name()) {
				return errcode.Damaged.Errorf("the image set has %q, which is not an image that CRIU writes of a container", e.Name())
			}
		}
		if left -= len(entries); left < 0 {
			return errcode.Damaged.Errorf("the image set has more than %d files", maxImages)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
