// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"fmt"
	"net/netip"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Socket is an IP socket of a process, by its descriptor there.
type Socket struct {
	// PID is the process's in the container.
	PID         int32              `json:"pid"`
	FD          int32              `json:"fd"`
	Options     []SocketOption     `json:"options,omitempty"`
	Memberships []SocketMembership `json:"memberships,omitempty"`
}

// SocketOption is an option in which a socket differs from a new one. Level and
// name are setsockopt's. Text is the name of a network interface or a congestion
// control, where the value is not a number.
type SocketOption struct {
	Level uint32 `json:"level"`
	Name  uint32 `json:"name"`
	Value int32  `json:"value,omitempty"`
	Text  string `json:"text,omitempty"`
}

// SocketMembership is a multicast group that a socket has joined.
type SocketMembership struct {
	Interface string     `json:"interface"`
	Group     netip.Addr `json:"group"`
	// Exclude: the socket receives from all but the sources; else from these only.
	Exclude bool         `json:"exclude,omitempty"`
	Sources []netip.Addr `json:"sources,omitempty"`
}

// NewSockets are those of messages. Texts without an address become invalid ones,
// which [Manifest.CheckRestore] refuses.
func NewSockets(messages []*api.Socket) []Socket {
	var out []Socket
	for _, m := range messages {
		s := Socket{PID: m.GetPid(), FD: m.GetFd()}
		for _, o := range m.GetOptions() {
			s.Options = append(s.Options, SocketOption{o.GetLevel(), o.GetName(), o.GetValue(), o.GetText()})
		}
		for _, g := range m.GetMemberships() {
			group, _ := netip.ParseAddr(g.GetGroup())
			sm := SocketMembership{Interface: g.GetInterface(), Group: group, Exclude: g.GetExclude()}
			for _, text := range g.GetSources() {
				source, _ := netip.ParseAddr(text)
				sm.Sources = append(sm.Sources, source)
			}
			s.Memberships = append(s.Memberships, sm)
		}
		out = append(out, s)
	}
	return out
}

// SocketMessages are the messages of sockets.
func SocketMessages(sockets []Socket) []*api.Socket {
	var out []*api.Socket
	for _, s := range sockets {
		m := &api.Socket{Pid: s.PID, Fd: s.FD}
		for _, o := range s.Options {
			m.Options = append(m.Options, &api.SocketOption{Level: o.Level, Name: o.Name, Value: o.Value, Text: o.Text})
		}
		for _, g := range s.Memberships {
			gm := &api.Membership{Interface: g.Interface, Group: g.Group.String(), Exclude: g.Exclude}
			for _, source := range g.Sources {
				gm.Sources = append(gm.Sources, source.String())
			}
			m.Memberships = append(m.Memberships, gm)
		}
		out = append(out, m)
	}
	return out
}

func (s *Socket) check() error {
	if s.PID < 1 || s.FD < 0 {
		return fmt.Errorf("a socket is descriptor %d of process %d", s.FD, s.PID)
	}
	err := errclass.Join(checkCount("options of a socket", len(s.Options), maxSocketParts), checkCount("multicast groups of a socket", len(s.Memberships), maxSocketParts))
	for _, o := range s.Options {
		if o.Text != "" && !isInterface(o.Text) {
			err = errclass.Join(err, fmt.Errorf("the socket option %d has an invalid text, %q", o.Name, o.Text))
		}
	}
	for _, m := range s.Memberships {
		err = errclass.Join(err, checkCount("sources of a multicast group", len(m.Sources), maxSocketParts))
		if !m.Group.IsMulticast() || m.Group.Zone() != "" || m.Group.Is4In6() || !isInterface(m.Interface) {
			err = errclass.Join(err, fmt.Errorf("a socket has joined the group %q on %q", m.Group, m.Interface))
		}
		for _, source := range m.Sources {
			if !source.IsValid() || source.Is4() != m.Group.Is4() || source.Zone() != "" {
				err = errclass.Join(err, fmt.Errorf("%q cannot be a source of the group %s", source, m.Group))
			}
		}
	}
	return err
}

// isInterface reports whether a text may name an interface or, of the same
// length, a congestion control.
func isInterface(name string) bool { return checkName(name) == nil && len(name) <= maxInterfaceName }
