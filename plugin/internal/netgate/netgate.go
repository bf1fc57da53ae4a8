// SPDX-License-Identifier: Apache-2.0

// Package netgate keeps the peers of a container's TCP connections waiting while
// nobody has the connections: from the end of the VM that had them until a
// restore has put them into another one. What a peer sends meanwhile meets a
// kernel without the connection (the new guest's, or that of the network
// namespace itself before Kata has taken its interface over), which answers with
// a reset, and the connection is lost. A peer that gets no answer at all sends
// again.
//
// The gate is in the sandbox's network namespace and drops what leaves through
// it of exactly these connections. It is a root qdisc of the interface
// (egress), because Kata claims the ingress qdisc and fails if there is one
// already. Kata sends what the guest sends out of the same interface, by
// tcfilter as by macvtap (Kata 4.1.0,
// src/runtime/virtcontainers/network_linux.go and src/runtime-rs,
// crates/resource/src/network), so that the gate can be closed before there is
// a VM.
//
// The gate is the namespace's: it outlives the shim that closed it, a namespace
// that goes takes it along, and whoever next creates a sandbox there opens it or
// continues from it. The shim (package plugin/internal/task) calls it.
package netgate

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Connection is a TCP connection as the container has it.
type Connection struct {
	Local, Remote netip.AddrPort
}

// maxConnections bounds the filters of an interface. They are looked at one by
// one. Where there are more connections, all TCP of their addresses is dropped.
const maxConnections = 1000

var (
	// root names our qdisc: no tool chooses this handle on its own.
	root = netlink.MakeHandle(0x6b63, 0)
	// drop is the class whose packets go nowhere.
	drop = netlink.MakeHandle(0x6b63, 1)
)

// Close makes the gate of a network namespace drop what leaves of these
// connections, and of no others, whatever it dropped before. Without connections
// it removes the gate. path is that of the namespace; one that is gone has no
// gate.
func Close(path string, connections []Connection) error {
	err := inNamespace(path, func(h *netlink.Handle) error { return closeGate(h, connections) })
	if len(connections) == 0 && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("hold back the packets of %d TCP connections in %s: %w", len(connections), path, err)
	}
	return nil
}

// Open removes the gate of a network namespace. Without a gate or a namespace
// it does nothing.
func Open(path string) error { return Close(path, nil) }

func inNamespace(path string, do func(*netlink.Handle) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := netlink.NewHandleAt(netns.NsHandle(f.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("enter the network namespace: %w", err)
	}
	defer h.Close()
	return do(h)
}

func closeGate(h *netlink.Handle, connections []Connection) error {
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var failed []error
	held := make(map[netip.Addr]bool)
	for _, link := range links {
		if !kataTakes(link) {
			continue
		}
		here, err := leavingBy(h, link, connections)
		if err == nil {
			err = set(h, link, here)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", link.Attrs().Name, err))
			continue
		}
		for _, c := range here {
			held[c.Local.Addr()] = true
		}
	}
	if err := errclass.Join(failed...); err != nil {
		return err
	}
	for _, c := range connections {
		if !held[c.Local.Addr()] {
			return fmt.Errorf("no interface whose packets pass through the namespace has the address %s", c.Local.Addr())
		}
	}
	return nil
}

// kataTakes reports whether Kata connects the guest by way of the interface. Of
// what it hands to the guest whole, nothing passes through here.
func kataTakes(link netlink.Link) bool {
	return slices.Contains([]string{"veth", "macvlan", "ipvlan"}, link.Type())
}

// leavingBy are the connections whose packets leave through an interface: those of
// its addresses, or all where it has none, as while Kata has them by macvtap.
func leavingBy(h *netlink.Handle, link netlink.Link, connections []Connection) ([]Connection, error) {
	if len(connections) == 0 {
		return nil, nil
	}
	addresses, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	has := func(want netip.Addr) bool {
		return slices.ContainsFunc(addresses, func(a netlink.Addr) bool {
			have, ok := netip.AddrFromSlice(a.IP)
			return ok && have.Unmap() == want
		})
	}
	global := slices.ContainsFunc(addresses, func(a netlink.Addr) bool { return a.IP.IsGlobalUnicast() })
	var out []Connection
	for _, c := range connections {
		if !global || has(c.Local.Addr()) {
			out = append(out, c)
		}
	}
	return out, nil
}

// set makes an interface drop these connections' packets.
func set(h *netlink.Handle, link netlink.Link, connections []Connection) error {
	index := link.Attrs().Index
	qdiscs, err := h.QdiscList(link)
	if err != nil {
		return fmt.Errorf("list qdiscs: %w", err)
	}
	closed := false
	for _, q := range qdiscs {
		switch a := q.Attrs(); {
		case a.Parent != netlink.HANDLE_ROOT, a.Handle == 0: // not the root, or the kernel's default
		case a.Handle == root:
			closed = true
		case len(connections) > 0:
			return fmt.Errorf("there is a root qdisc already (%s)", q.Type())
		}
	}
	if len(connections) == 0 {
		if !closed {
			return nil
		}
		if err := h.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: root, Parent: netlink.HANDLE_ROOT}}); err != nil {
			return fmt.Errorf("delete the root qdisc: %w", err)
		}
		return nil
	}
	if !closed {
		// What no filter matches is sent at once, for want of a default class.
		if err := h.QdiscAdd(netlink.NewHtb(netlink.QdiscAttrs{LinkIndex: index, Handle: root, Parent: netlink.HANDLE_ROOT})); err != nil {
			return fmt.Errorf("add a root qdisc: %w", err)
		}
	}
	// Both may be there, or be missing where whoever began has been killed.
	class := netlink.NewHtbClass(netlink.ClassAttrs{LinkIndex: index, Handle: drop, Parent: root}, netlink.HtbClassAttrs{Rate: 1 << 20})
	if err := h.ClassReplace(class); err != nil {
		return fmt.Errorf("add a class: %w", err)
	}
	hole := &netlink.GenericQdisc{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: drop}, QdiscType: "blackhole"}
	if err := h.QdiscReplace(hole); err != nil {
		return fmt.Errorf("add a qdisc to the class: %w", err)
	}
	return setFilters(h, link, filters(index, connections))
}

// setFilters adds what is missing before it removes what is too much, so that
// what is held before and after is never let through.
func setFilters(h *netlink.Handle, link netlink.Link, want []*netlink.U32) error {
	list, err := h.FilterList(link, root)
	if err != nil {
		return fmt.Errorf("list filters: %w", err)
	}
	have := make(map[string]netlink.Filter, len(list))
	for _, f := range list {
		if u, ok := f.(*netlink.U32); ok {
			have[match(u)] = u
		}
	}
	for _, f := range want {
		if _, there := have[match(f)]; there {
			delete(have, match(f))
			continue
		}
		if err := h.FilterAdd(f); err != nil {
			return fmt.Errorf("add a filter: %w", err)
		}
	}
	for _, f := range have {
		if err := h.FilterDel(f); err != nil {
			return fmt.Errorf("delete a filter: %w", err)
		}
	}
	return nil
}
