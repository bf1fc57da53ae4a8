// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/lazyregexp"
)

// Bounds of a manifest's lists and strings. No container comes near them.
const (
	maxMounts      = 4096
	maxConnections = 1 << 16
	maxAddresses   = 4096
	maxOpenFiles   = 1 << 16
	maxSockets     = 1 << 16
	maxAttributes  = 1 << 15
	maxSocketParts = 1024 // options, groups and sources, each
	maxArgs        = 1 << 16
	maxPhases      = 1024
	maxFeatures    = 1024
	maxGroups      = 1 << 16 // NGROUPS_MAX
	maxNames       = 128
	maxID          = 255
	maxHostname    = 64   // as in Linux (__NEW_UTS_LEN)
	maxPath        = 4096 // PATH_MAX
)

var (
	stdioKey = lazyregexp.New(`^(pipe:\[[1-9][0-9]{0,19}\]|tty\[[0-9a-f]{1,16}:[0-9a-f]{1,16}\])$`)
	feature  = lazyregexp.New(`^[a-z0-9][a-z0-9_.-]{0,63}$`)
	word     = lazyregexp.New(`^[A-Za-z_]{1,64}$`)

	fingerprint = lazyregexp.New(`^SHA256:[A-Za-z0-9+/]{43}$`)

	attributeName  = lazyregexp.New(`^[a-z-]{1,64}$`)
	attributeValue = lazyregexp.New(`^[0-9a-f,-]+$`)

	fsType = lazyregexp.New(`^[a-z0-9_.-]{0,64}$`)
)

// ExternalName is the name that CRIU's images have for the external mount at
// index i of the manifest's list.
func ExternalName(i int) string { return fmt.Sprintf("m%d", i) }

// check checks all that is known of a manifest without its files.
func (m *Manifest) check() error {
	c := m.Container
	if err := errclass.Join(
		checkText("container ID", c.ID, maxID), checkText("containerd namespace", c.Namespace, maxID),
		checkText("pod namespace", c.PodNamespace, maxID), checkText("image", c.Image, maxPath),
		checkText("host name", c.Hostname, maxHostname), checkText("kernel", m.Guest.Kernel, maxID),
		checkCount("arguments", len(c.Args), maxArgs), checkCount("mounts", len(c.Mounts), maxMounts),
		checkCount("phases", len(m.Phases), maxPhases),
	); err != nil {
		return err
	}
	for _, a := range c.Args {
		if strings.ContainsRune(a, 0) {
			return fmt.Errorf("argument %q has a NUL", a)
		}
	}
	for _, d := range c.Mounts {
		if err := checkDestination(d); err != nil {
			return err
		}
	}
	for _, p := range m.Phases {
		if err := checkText("phase", p.Name, maxID); err != nil {
			return err
		}
		if p.Duration < 0 {
			return fmt.Errorf("phase %q has a negative duration", p.Name)
		}
	}
	if m.SignedBy != "" && !fingerprint.MatchString(m.SignedBy) {
		return fmt.Errorf("its signer %.80q is not the fingerprint of a key", m.SignedBy)
	}
	if err := m.Rights.check(); err != nil {
		return err
	}
	if err := m.CheckRestore(); err != nil {
		return err
	}
	return m.checkFiles()
}

func (r *Rights) check() error {
	if r == nil {
		return nil
	}
	if err := checkCount("groups", len(r.Groups), maxGroups); err != nil {
		return err
	}
	sets := [][]string{r.Namespaces}
	if c := r.Capabilities; c != nil {
		sets = append(sets, c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient)
	}
	for _, set := range sets {
		if err := checkCount("names", len(set), maxNames); err != nil {
			return err
		}
		for _, name := range set {
			if !word.MatchString(name) {
				return fmt.Errorf("%.80q is neither a capability nor a namespace", name)
			}
		}
	}
	for _, list := range [][]string{r.MaskedPaths, r.ReadonlyPaths} {
		if err := checkCount("paths", len(list), maxMounts); err != nil {
			return err
		}
		for _, p := range list {
			if !path.IsAbs(p) {
				return fmt.Errorf("masked path %.80q is not absolute", p)
			}
			if err := checkText("masked path", p, maxPath); err != nil {
				return err
			}
		}
	}
	return nil
}

// CheckRestore checks the part of a manifest that a restore passes to the guest.
// The agent checks it again, because it does not rely on its caller.
func (m *Manifest) CheckRestore() error {
	if err := errclass.Join(
		checkCount("external mounts", len(m.Externals), maxMounts), checkCount("descriptors", len(m.Stdio), 3),
		checkCount("TCP connections", len(m.Connections), maxConnections), checkCount("addresses", len(m.Addresses), maxAddresses),
		checkCount("open files", len(m.OpenFiles), maxOpenFiles), checkCount("CPU features", len(m.Guest.CPUFeatures), maxFeatures),
		checkCount("sockets", len(m.Sockets), maxSockets), checkCount("attributes", len(m.Attributes), maxAttributes),
	); err != nil {
		return err
	}
	for _, ns := range m.Options.EmptyNamespaces {
		if ns != "network" {
			return fmt.Errorf("namespace %q cannot be empty", ns)
		}
	}
	for _, f := range m.Guest.CPUFeatures {
		if !feature.MatchString(f) {
			return fmt.Errorf("CPU feature %q has an invalid name", f)
		}
	}
	if err := m.checkExternals(); err != nil {
		return err
	}
	for i, s := range m.Stdio {
		if s.FD > 2 || slices.ContainsFunc(m.Stdio[:i], func(o Stdio) bool { return o.FD == s.FD }) {
			return fmt.Errorf("descriptor %d is not one of 0 to 2, or listed twice", s.FD)
		}
		if s.Key != "" && !stdioKey.MatchString(s.Key) {
			return fmt.Errorf("descriptor %d has an invalid key, %q", s.FD, s.Key)
		}
	}
	for _, c := range m.Connections {
		if !c.Local.IsValid() || !c.Remote.IsValid() {
			return errors.New("a TCP connection lacks an end")
		}
	}
	for _, a := range m.Addresses {
		if err := a.check(); err != nil {
			return err
		}
	}
	for _, a := range m.Attributes {
		if !attributeName.MatchString(a.Name) || !attributeValue.MatchString(a.Value) || len(a.Value) > maxPath {
			return fmt.Errorf("attribute %.80q of process %d has an invalid name or value, %.80q", a.Name, a.PID, a.Value)
		}
	}
	for _, s := range m.Sockets {
		if err := s.check(); err != nil {
			return err
		}
	}
	for _, f := range m.OpenFiles {
		if p := string(f.Bytes()); !path.IsAbs(p) || len(p) > maxPath || strings.ContainsRune(p, 0) {
			return fmt.Errorf("open file %.80q is not an absolute path", p)
		}
	}
	return nil
}

// checkExternals accepts a list of mounts that are named by their position: the
// names reach CRIU's option parser.
func (m *Manifest) checkExternals() error {
	seen := make(map[string]bool, len(m.Externals))
	for i, e := range m.Externals {
		if e.Name != ExternalName(i) {
			return fmt.Errorf("external mount %d is named %q and not %q", i, e.Name, ExternalName(i))
		}
		if err := checkDestination(e.Destination); err != nil {
			return err
		}
		if seen[e.Destination] {
			return fmt.Errorf("it lists the mount at %q twice", e.Destination)
		}
		seen[e.Destination] = true
		if !fsType.MatchString(e.FSType) {
			return fmt.Errorf("the mount at %q has an invalid file system type, %q", e.Destination, e.FSType)
		}
	}
	return nil
}

func (m *Manifest) checkFiles() error {
	seen, bytes := make(map[string]bool, len(m.Files)), int64(0)
	for _, f := range m.Files {
		bytes += f.Size
		switch {
		case checkName(f.Name) != nil:
			return checkName(f.Name)
		case isOurs(f.Name), seen[f.Name]:
			return fmt.Errorf("it lists %q twice", f.Name)
		case !IsImage(f.Name):
			return fmt.Errorf("it lists %q, which is not an image that CRIU writes of a container", f.Name)
		case f.Size < 0 || bytes < 0 || !f.digestsAreValid():
			return fmt.Errorf("size or digest of %q is invalid", f.Name)
		}
		seen[f.Name] = true
	}
	return nil
}

func checkDestination(d string) error {
	if !path.IsAbs(d) || path.Clean(d) != d || d == "/" {
		return fmt.Errorf("mount point %q is not a clean absolute path", d)
	}
	return checkText("mount point", d, maxPath)
}

// checkText accepts what can be printed: no control characters.
func checkText(what, s string, limit int) error {
	if len(s) > limit || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("%s %.80q is longer than %d bytes or has control characters", what, s, limit)
	}
	return nil
}

func checkCount(what string, n, limit int) error {
	if n > limit {
		return fmt.Errorf("it has %d %s, and at most %d are allowed", n, what, limit)
	}
	return nil
}
