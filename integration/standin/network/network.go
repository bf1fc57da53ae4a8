// SPDX-License-Identifier: Apache-2.0

// Package network connects a VM with the interfaces of its sandbox's network
// namespace by Kata's default model, tcfilter: each veth gets a tap, which is
// the VM's network card, and what arrives at either is redirected to the other.
// The guest then takes over the veth's name, hardware address and addresses.
// Kata: setupTCFiltering in src/runtime/virtcontainers/network_linux.go and, in
// src/runtime-rs, resource/src/network.
package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
)

// Card is a network card for the VM.
type Card struct {
	// MAC is the veth's address.
	MAC string
	// Tap has to be closed once the VMM has it. The tap disappears with its
	// last descriptor.
	Tap *os.File
}

// Network is a sandbox's part of its network namespace.
type Network struct {
	namespace *netns.Namespace
	attached  []netlink.Link
}

// New returns a Network with nothing attached.
func New(namespace *netns.Namespace) *Network { return &Network{namespace: namespace} }

// Attach finds the interfaces that were added since the last call and creates a
// card for each. As in Kata, an interface without an address is ignored.
func (n *Network) Attach() (cards []Card, err error) {
	defer func() {
		if err != nil {
			Close(cards)
			cards, err = nil, fmt.Errorf("attach the network namespace's interfaces: %w", err)
		}
	}()
	return cards, n.namespace.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, link := range links {
			addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			if link.Type() != "veth" || len(addresses) == 0 || n.has(link) {
				continue
			}
			tap, err := connect(link, len(n.attached))
			if err != nil {
				return fmt.Errorf("%s: %w", link.Attrs().Name, err)
			}
			n.attached = append(n.attached, link)
			cards = append(cards, Card{MAC: link.Attrs().HardwareAddr.String(), Tap: tap})
		}
		return nil
	})
}

// Close closes the taps of cards.
func Close(cards []Card) {
	for _, c := range cards {
		c.Tap.Close()
	}
}

func (n *Network) has(link netlink.Link) bool {
	for _, a := range n.attached {
		if a.Attrs().Index == link.Attrs().Index {
			return true
		}
	}
	return false
}

// connect creates a veth's tap and returns its descriptor.
func connect(veth netlink.Link, number int) (_ *os.File, err error) {
	tap := &netlink.Tuntap{
		LinkAttrs:  netlink.LinkAttrs{Name: fmt.Sprintf("tap%d_kata", number)},
		Mode:       netlink.TUNTAP_MODE_TAP,
		Flags:      netlink.TUNTAP_ONE_QUEUE | netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
		Queues:     1,
		NonPersist: true,
	}
	if err := netlink.LinkAdd(tap); err != nil {
		return nil, fmt.Errorf("create a tap: %w", err)
	}
	defer func() {
		if err != nil {
			tap.Fds[0].Close()
		}
	}()
	made, err := netlink.LinkByName(tap.Name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", tap.Name, err)
	}
	if err := netlink.LinkSetMTU(made, veth.Attrs().MTU); err != nil {
		return nil, fmt.Errorf("set the MTU of %s: %w", tap.Name, err)
	}
	if err := netlink.LinkSetUp(made); err != nil {
		return nil, fmt.Errorf("set %s up: %w", tap.Name, err)
	}
	// The tap's qdisc disappears with the tap, the veth's would stay.
	if err := join(made, veth); err != nil {
		return nil, err
	}
	if err := join(veth, made); err != nil {
		return nil, errors.Join(err, netlink.QdiscDel(ingress(veth)))
	}
	return tap.Fds[0], nil
}

// join redirects what arrives at one link to another, bypassing the namespace's
// network stack.
func join(from, to netlink.Link) error {
	if err := netlink.QdiscAdd(ingress(from)); err != nil {
		return fmt.Errorf("add an ingress qdisc to %s: %w", from.Attrs().Name, err)
	}
	if err := redirect(from, to); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

func ingress(link netlink.Link) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_INGRESS}}
}

func redirect(from, to netlink.Link) error {
	return netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Protocol: unix.ETH_P_ALL},
		Actions: []netlink.Action{&netlink.MirredAction{
			ActionAttrs:  netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
			MirredAction: netlink.TCA_EGRESS_REDIR,
			Ifindex:      to.Attrs().Index,
		}},
	})
}

// Remove removes the redirections. The taps have disappeared with the VMM. The
// engine may have removed the namespace already.
func (n *Network) Remove() error {
	if len(n.attached) == 0 {
		return nil
	}
	err := n.namespace.Do(func() error {
		var failures []error
		for _, link := range n.attached {
			if err := netlink.QdiscDel(ingress(link)); err != nil && !errors.Is(err, unix.ENODEV) {
				failures = append(failures, fmt.Errorf("%s: %w", link.Attrs().Name, err))
			}
		}
		return errors.Join(failures...)
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("detach the network namespace's interfaces: %w", err)
	}
	return nil
}

// Describe returns what the guest has to set up: the current state of the
// namespace.
func (n *Network) Describe() (*api.UpdateNetworkRequest, error) {
	r := &api.UpdateNetworkRequest{}
	if len(n.attached) == 0 {
		return r, nil
	}
	err := n.namespace.Do(func() error {
		for _, link := range n.attached {
			if err := describe(r, link); err != nil {
				return fmt.Errorf("%s: %w", link.Attrs().Name, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("describe the network: %w", err)
	}
	return r, nil
}
