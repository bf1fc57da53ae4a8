// Package network connects a VM with the interfaces of its sandbox's network
// namespace by Kata's default model, tcfilter: each veth gets a tap beside it,
// which is the VM's network card, and whatever arrives at either is redirected
// to the other. The guest then takes over the veth's name, hardware address and
// addresses. Kata: setupTCFiltering in
// src/runtime/virtcontainers/network_linux.go and, in src/runtime-rs,
// resource/src/network.
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
	// MAC is the veth's.
	MAC string
	// Tap is to be closed once the VMM has it. The tap goes with its last
	// descriptor.
	Tap *os.File
}

// Network is what a sandbox has in its network namespace.
type Network struct {
	namespace *netns.Namespace
	attached  []netlink.Link
}

// New attaches nothing yet.
func New(namespace *netns.Namespace) *Network { return &Network{namespace: namespace} }

// Attach looks for interfaces that have come since the last time and makes a
// card for each. As in Kata, one without an address is not configured, and left
// alone.
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

// connect makes the tap of a veth and gives its descriptor.
func connect(veth netlink.Link, number int) (_ *os.File, err error) {
	tap := &netlink.Tuntap{
		LinkAttrs:  netlink.LinkAttrs{Name: fmt.Sprintf("tap%d_kata", number)},
		Mode:       netlink.TUNTAP_MODE_TAP,
		Flags:      netlink.TUNTAP_ONE_QUEUE | netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
		Queues:     1,
		NonPersist: true,
	}
	if err := netlink.LinkAdd(tap); err != nil {
		return nil, fmt.Errorf("make a tap: %w", err)
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
	// The tap's queue goes with the tap, the veth's would stay.
	if err := join(made, veth); err != nil {
		return nil, err
	}
	if err := join(veth, made); err != nil {
		return nil, errors.Join(err, netlink.QdiscDel(ingress(veth)))
	}
	return tap.Fds[0], nil
}

// join sends out at one link what comes in at another, unseen by the
// namespace's own network stack.
func join(from, to netlink.Link) error {
	if err := netlink.QdiscAdd(ingress(from)); err != nil {
		return fmt.Errorf("add an ingress queue to %s: %w", from.Attrs().Name, err)
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

// Remove takes the redirections away. The taps have gone with the VMM. An
// engine may have removed the namespace before.
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

// Describe says what the guest has to set up: what is in the namespace now.
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
