// Package netlock holds back the packets of TCP connections with nftables, so
// that peers neither hear from a container nor get an answer in its stead.
// CRIU does the same for the time of a dump; the guest agent calls this where
// the silence has to outlast the dump. It speaks netfilter's netlink protocol
// itself: a slim guest has no nft.
package netlock

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// Lock drops every packet of the connections, in both directions, until
// Unlock is called with the same name. It is for the caller's network namespace.
func Lock(name string, list []inspect.Connection) error {
	b := newBatch()
	b.add(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, text(unix.NFTA_TABLE_NAME, name))
	for _, h := range hooks {
		b.add(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, text(unix.NFTA_CHAIN_TABLE, name), text(unix.NFTA_CHAIN_NAME, h.chain),
			nested(unix.NFTA_CHAIN_HOOK, number(unix.NFTA_HOOK_HOOKNUM, h.number), number(unix.NFTA_HOOK_PRIORITY, 0)),
			text(unix.NFTA_CHAIN_TYPE, "filter"))
		for _, c := range list {
			from, to := c.Local, c.Remote
			if h.number == unix.NF_INET_LOCAL_IN {
				from, to = to, from
			}
			b.add(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, text(unix.NFTA_RULE_TABLE, name), text(unix.NFTA_RULE_CHAIN, h.chain),
				nested(unix.NFTA_RULE_EXPRESSIONS, dropPackets(from, to)...))
		}
	}
	if err := b.send(); err != nil {
		return fmt.Errorf("hold back the packets of %d TCP connections by nftables: %w", len(list), err)
	}
	return nil
}

// hooks are where the rules sit: between the network and the guest's own sockets.
var hooks = []struct {
	chain  string
	number uint32
}{{"in", unix.NF_INET_LOCAL_IN}, {"out", unix.NF_INET_LOCAL_OUT}}

// Unlock lets the packets through again. A name without a lock is no error.
func Unlock(name string) error {
	b := newBatch()
	b.add(unix.NFT_MSG_DELTABLE, 0, text(unix.NFTA_TABLE_NAME, name))
	if err := b.send(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("let the packets of TCP connections through again: %w", err)
	}
	return nil
}
