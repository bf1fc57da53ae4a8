// SPDX-License-Identifier: Apache-2.0

// Package imageset is the format of a checkpoint on disk: it names the files,
// writes them and verifies them.
//
// An image set is a flat directory of regular files, because the CRI unpacks
// nothing else: CRIU's images, the content of /dev/shm, and a manifest that is
// written last. A directory without a manifest is not an image set. The shim
// (package plugin/internal/task) is the only writer: it copies what the guest
// wrote with [Follow] and [Follower.Collect], which trust none of it, and
// commits it with [Target.Commit]. Before a restore, [Open] and [Set.CopyTo]
// accept an image set only if it has every file of its manifest, unchanged, and
// no other.
//
// Written against containerd 2.4 and CRIU 4.2.
package imageset

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// FormatVersion is that of the manifests that this release writes. It reads
// older ones, too, and no newer one (RELEASES.md). Version 1 has no rights, and
// is never signed; version 2 has SHA-256 as digests.
const FormatVersion = 3

// maxManifest bounds what is read of a manifest, in bytes.
const maxManifest = 16 << 20

// Manifest describes an image set: its files, the container that it was made
// from and what its restore needs. It is JSON in the file [ManifestName].
type Manifest struct {
	FormatVersion int       `json:"formatVersion"`
	Created       time.Time `json:"created"`
	// SignedBy is the fingerprint of the key that the manifest is said to be signed
	// with, see [Set.Verify]. It is empty if it is not signed.
	SignedBy  string    `json:"signedBy,omitempty"`
	Container Container `json:"container"`
	// Rights are those that the container had, nil if unknown.
	Rights *Rights `json:"rights,omitempty"`
	Guest  Guest   `json:"guest"`
	// Options that CRIU dumped with; the restore applies them again.
	Options Options `json:"options"`
	// Externals are mounts whose content is not in the image set.
	Externals []External `json:"externals,omitempty"`
	Stdio     []Stdio    `json:"stdio,omitempty"`
	// Connections are the TCP connections in the image set whose other end is
	// outside of the container.
	Connections []Connection `json:"connections,omitempty"`
	// Addresses are those of the guest's network interfaces, without loopback.
	Addresses []Address `json:"addresses,omitempty"`
	// Sockets have options that CRIU does not restore.
	Sockets []Socket `json:"sockets,omitempty"`
	// Attributes are what CRIU does not restore of threads.
	Attributes []Attribute `json:"attributes,omitempty"`
	// Terminal: the container's process had one.
	Terminal bool `json:"terminal,omitempty"`
	// OpenFiles are files outside the image set that the processes held open.
	OpenFiles []OpenFile `json:"openFiles,omitempty"`
	Phases    []Phase    `json:"phases,omitempty"`
	Files     []File     `json:"files"`
}

// Container is what an image set was made from.
type Container struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	// PodNamespace is that of the container's pod in Kubernetes.
	PodNamespace string `json:"podNamespace,omitempty"`
	// Image is the engine's name for the container's image, where it has told the
	// shim.
	Image string   `json:"image,omitempty"`
	Args  []string `json:"args,omitempty"`
	// Mounts are the destinations where a new container has to have a mount.
	Mounts   []string `json:"mounts,omitempty"`
	Hostname string   `json:"hostname,omitempty"`
}

// Rights are what the OCI spec of a container gives it.
type Rights struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
	// Capabilities are nil if the spec does not mention any. Which ones the
	// container then has depends on Kata's shim.
	Capabilities  *Capabilities `json:"capabilities,omitempty"`
	NoNewPrivs    bool          `json:"noNewPrivileges"`
	Seccomp       bool          `json:"seccomp"`
	MaskedPaths   []string      `json:"maskedPaths,omitempty"`
	ReadonlyPaths []string      `json:"readonlyPaths,omitempty"`
	// Namespaces are the types of those that the container has for itself, or
	// shares with its pod, as opposed to the guest's.
	Namespaces []string `json:"namespaces,omitempty"`
}

// Capabilities are sets of names such as CAP_CHOWN.
type Capabilities struct {
	Bounding    []string `json:"bounding,omitempty"`
	Effective   []string `json:"effective,omitempty"`
	Permitted   []string `json:"permitted,omitempty"`
	Inheritable []string `json:"inheritable,omitempty"`
	Ambient     []string `json:"ambient,omitempty"`
}

// Guest is the VM that an image set was made in.
type Guest struct {
	Kernel string `json:"kernel"`
	// CRIUVersion is major*10000 + minor*100 + sublevel.
	CRIUVersion uint32   `json:"criuVersion"`
	CPUFeatures []string `json:"cpuFeatures,omitempty"`
}

// Options are CRIU's, as far as a restore has to know them.
type Options struct {
	TCPEstablished      bool     `json:"tcpEstablished,omitempty"`
	TCPClose            bool     `json:"tcpClose,omitempty"`
	ExternalUnixSockets bool     `json:"externalUnixSockets,omitempty"`
	Terminal            bool     `json:"terminal,omitempty"`
	FileLocks           bool     `json:"fileLocks,omitempty"`
	EmptyNamespaces     []string `json:"emptyNamespaces,omitempty"`
}

// External is a mount that the new container provides.
type External struct {
	// Name is [ExternalName] of its index.
	Name        string `json:"name"`
	Destination string `json:"destination"`
	FSType      string `json:"fsType,omitempty"`
	Device      bool   `json:"device,omitempty"`
}

// Stdio is CRIU's key for one of the descriptors 0 to 2.
type Stdio struct {
	FD  uint32 `json:"fd"`
	Key string `json:"key,omitempty"`
}

// Connection is a TCP connection as the container had it.
type Connection struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
}

// Address is an IP address of a network interface.
type Address struct {
	Interface string     `json:"interface"`
	Address   netip.Addr `json:"address"`
}

// ParseAddress accepts the names that interfaces have, and addresses without a
// zone.
func ParseAddress(iface, address string) (Address, error) {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return Address{}, fmt.Errorf("address of a network interface: %w", err)
	}
	a := Address{Interface: iface, Address: addr}
	return a, a.check()
}

// maxInterfaceName is the longest name of an interface (IFNAMSIZ, less its NUL).
const maxInterfaceName = 15

func (a Address) check() error {
	if err := checkName(a.Interface); err != nil || len(a.Interface) > maxInterfaceName {
		return fmt.Errorf("network interface %q has an invalid name", a.Interface)
	}
	if !a.Address.IsValid() || a.Address.Zone() != "" {
		return fmt.Errorf("network interface %s has an invalid address, %q", a.Interface, a.Address)
	}
	return nil
}

// Attribute is something of a thread that is set again after CRIU has restored it:
// what a system call has given to it.
type Attribute struct {
	// PID and Thread are in the container's PID namespace. Thread is 0 for the main
	// thread.
	PID    uint32 `json:"pid"`
	Thread uint32 `json:"thread,omitempty"`
	// Name is in a table of the agent's, and Value is as that says.
	Name  string `json:"name"`
	Value string `json:"value"`
}

// OpenFile is a file by its path in the container and its size in bytes.
type OpenFile struct {
	// Path is what can be printed of it, and RawPath its bytes where that is not
	// all: names of files have no encoding.
	Path    string `json:"path"`
	RawPath []byte `json:"rawPath,omitempty"`
	Size    uint64 `json:"size"`
	// MayGrow: it was open for appending only, and is restored whatever its size.
	MayGrow bool `json:"mayGrow,omitempty"`
}

// NewOpenFile returns a file with a path of any bytes.
func NewOpenFile(path []byte, size uint64, mayGrow bool) OpenFile {
	f := OpenFile{Path: text.Line(string(path), maxPath), Size: size, MayGrow: mayGrow}
	if f.Path != string(path) {
		f.RawPath = path
	}
	return f
}

// Bytes are those of the path.
func (f OpenFile) Bytes() []byte {
	if f.RawPath != nil {
		return f.RawPath
	}
	return []byte(f.Path)
}

// Phase is a step of the checkpoint and its duration.
type Phase struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"nanoseconds"`
}

// File is one of the set's files, the manifest excepted.
type File struct {
	Name string `json:"name"`
	// Size in bytes.
	Size int64 `json:"size"`
	// Digest of the content, in hexadecimal: BLAKE3 with 256 bits, or SHA-256 in
	// manifests before version 3.
	BLAKE3 string `json:"blake3,omitempty"`
	SHA256 string `json:"sha256,omitempty"`
}

// Bytes is the size of all files together, the manifest excepted.
func (m *Manifest) Bytes() int64 {
	var n int64
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}

// ErrNotImageSet is wrapped by the errors about a directory without a manifest.
var ErrNotImageSet = errcode.NotImageSet.Wrap(errors.New("not an image set of kata-checkpoint"))

// ReadManifest reads a manifest and checks all that can be checked without the
// files of its image set.
func ReadManifest(r io.Reader) (*Manifest, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", ManifestName, err)
	}
	return parseManifest(data)
}

func parseManifest(data []byte) (*Manifest, error) {
	if len(data) > maxManifest {
		return nil, errcode.Damaged.Errorf("%s is larger than %d bytes", ManifestName, maxManifest)
	}
	var version struct {
		FormatVersion int `json:"formatVersion"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, errcode.Damaged.Errorf("%s is damaged: %w; use another copy of the checkpoint", ManifestName, err)
	}
	if version.FormatVersion < 1 || version.FormatVersion > FormatVersion {
		return nil, errcode.NewerFormat.Errorf("%s has format version %d and this kata-checkpoint reads 1 to %d: restore with the version that made the checkpoint, or a newer one", ManifestName, version.FormatVersion, FormatVersion)
	}
	m := &Manifest{}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(m); err != nil {
		return nil, errcode.Damaged.Errorf("%s is damaged: %w; use another copy of the checkpoint", ManifestName, err)
	}
	if err := m.check(); err != nil {
		return nil, errcode.Damaged.Errorf("%s is damaged: %w; use another copy of the checkpoint", ManifestName, err)
	}
	if !slices.ContainsFunc(m.Files, func(f File) bool { return f.Name == InventoryName }) {
		return nil, errcode.Damaged.Errorf("%s does not list %s, without which CRIU cannot restore", ManifestName, InventoryName)
	}
	return m, nil
}

// checkName accepts the file names that an image set may have: no path, no
// leading dot (staging directories and whiteouts have one), printable ASCII.
func checkName(name string) error {
	if name == "" || len(name) > 255 || strings.HasPrefix(name, ".") || strings.Contains(name, "..") {
		return errcode.Damaged.Errorf("file name %q is not allowed in an image set", name)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == '\\' {
			return errcode.Damaged.Errorf("file name %q is not allowed in an image set", name)
		}
	}
	return nil
}
