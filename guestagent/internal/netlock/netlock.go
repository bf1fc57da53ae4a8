// SPDX-License-Identifier: Apache-2.0

// Package netlock keeps the peers of a frozen container's TCP connections from
// noticing that it is gone. A network lock drops the connections' packets, so
// that peers see neither data nor a FIN or RST, and repair mode closes sockets
// without sending either. CRIU locks the network for the duration of a dump;
// the agent calls this package where the lock has to outlast it.
//
// It relies on nf_tables and TCP_REPAIR as in Linux 6.18.
package netlock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Lock drops every packet of the connections, in both directions, until Unlock
// is called with the same name. It replaces an earlier lock of that name. It
// acts on the network namespace of the calling thread.
func Lock(name string, list []inspect.Connection) error {
	conn, err := dial(len(list))
	if err != nil {
		return err
	}
	table := conn.AddTable(tableOf(name))
	conn.DelTable(table)
	conn.AddTable(table)
	chains := []*nftables.Chain{
		conn.AddChain(chain(table, "input", nftables.ChainHookInput)),
		conn.AddChain(chain(table, "output", nftables.ChainHookOutput)),
	}
	for _, c := range chains {
		conn.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: acceptCRIU()})
	}
	for _, f := range families {
		keys := f.keys(list)
		if len(keys) == 0 {
			continue
		}
		set := &nftables.Set{Table: table, Name: f.name, KeyType: f.key, Concatenation: true}
		if err := conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("lock %d TCP connections with nftables: %w", len(list), err)
		}
		for chunk := range slices.Chunk(keys, maxElements) {
			if err := conn.SetAddElements(set, chunk); err != nil {
				return fmt.Errorf("lock %d TCP connections with nftables: %w", len(list), err)
			}
		}
		for _, c := range chains {
			conn.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: f.drop(set, c)})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("lock %d TCP connections with nftables: %w", len(list), err)
	}
	return nil
}

// Unlock lets the packets through again. Unlocking a name that is not locked is
// no error.
func Unlock(name string) error {
	conn, err := dial(0)
	if err != nil {
		return err
	}
	conn.DelTable(tableOf(name))
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unlock TCP connections: %w", err)
	}
	return nil
}

// criuTable is how the tables of CRIU begin; the rest is the run's id, or a part
// of it (criu/netfilter.c, nftables_get_table).
const criuTable = "CRIU-"

// RemoveStale removes the locks of CRIUs that died in a dump: of the run with this
// id, or of all where it is empty. A table without its CRIU locks the connections
// for good.
func RemoveStale(run string) error {
	conn, err := dial(0)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // without netfilter nothing is locked
	}
	if err != nil {
		return err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EINVAL) {
		return nil // without nf_tables neither
	}
	if err != nil {
		return fmt.Errorf("list nftables' tables: %w", err)
	}
	for _, t := range tables {
		id, ok := strings.CutPrefix(t.Name, criuTable)
		if !ok || run != "" && !strings.HasPrefix(run, id) {
			continue
		}
		if err := Unlock(t.Name); err != nil {
			return err
		}
	}
	return nil
}

const (
	// maxElements is how many set elements fit into one message, whose nested
	// attributes are at most 64 KiB long.
	maxElements = 512
	// elementBytes is more than an element takes in a message.
	elementBytes = 128
	// answerTimeout bounds the wait for the kernel, which answers while it
	// takes the batch. One that lacks nf_tables answers to the first message
	// only.
	answerTimeout = 5 * time.Second
)

// dial prepares a batch with as many set elements: it is sent as one message
// and takes effect as a whole or not at all.
func dial(elements int) (*nftables.Conn, error) {
	conn, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errclass.Join(c.SetWriteBuffer(64<<10+elements*elementBytes), c.SetDeadline(time.Now().Add(answerTimeout)))
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}

func tableOf(name string) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
}

// chain is a base chain between the network and the guest's own sockets.
func chain(table *nftables.Table, name string, hook *nftables.ChainHook) *nftables.Chain {
	return &nftables.Chain{Table: table, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter}
}

// family is a version of IP, with what differs in a rule.
type family struct {
	name     string
	key      nftables.SetDatatype
	protocol byte
	// Where a packet's header has its addresses, and how long they are.
	source, destination, length uint32
}

var families = []family{
	{"ip", concatenate(nftables.TypeIPAddr), unix.NFPROTO_IPV4, 12, 16, 4},
	{"ip6", concatenate(nftables.TypeIP6Addr), unix.NFPROTO_IPV6, 8, 24, 16},
}

func concatenate(address nftables.SetDatatype) nftables.SetDatatype {
	return nftables.MustConcatSetType(address, nftables.TypeInetService, address, nftables.TypeInetService)
}

// keys are the connections of the family as elements of its set: the local
// address and port, then the remote ones.
func (f family) keys(list []inspect.Connection) []nftables.SetElement {
	var out []nftables.SetElement
	for _, c := range list {
		if c.Local.Addr().BitLen() == int(8*f.length) {
			out = append(out, nftables.SetElement{Key: append(endpoint(c.Local), endpoint(c.Remote)...)})
		}
	}
	return out
}

// endpoint is an address and a port, which a register's four bytes are filled
// up for with zeros.
func endpoint(a netip.AddrPort) []byte {
	return append(binary.BigEndian.AppendUint16(a.Addr().AsSlice(), a.Port()), 0, 0)
}

// criuMark is on the packets by which CRIU puts a FIN into the queue of a socket
// that it restores (SOCCR_MARK in soccr/soccr.h). They never leave the guest.
const criuMark = 0xc114

// acceptCRIU is a rule: what CRIU sends to a socket that it restores arrives.
func acceptCRIU() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: binary.NativeEndian.AppendUint32(nil, criuMark)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// drop is a rule: a packet of TCP whose endpoints are in the set is dropped.
func (f family) drop(set *nftables.Set, c *nftables.Chain) []expr.Any {
	local, remote := f.source, f.destination
	localPort, remotePort := uint32(0), uint32(2)
	if c.Hooknum == nftables.ChainHookInput {
		local, remote, localPort, remotePort = remote, local, remotePort, localPort
	}
	const scratch, first = unix.NFT_REG_1, unix.NFT_REG32_00
	words := f.length / 4
	load := func(base expr.PayloadBase, offset, length, register uint32) expr.Any {
		return &expr.Payload{DestRegister: register, Base: base, Offset: offset, Len: length}
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: scratch},
		&expr.Cmp{Op: expr.CmpOpEq, Register: scratch, Data: []byte{f.protocol}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: scratch},
		&expr.Cmp{Op: expr.CmpOpEq, Register: scratch, Data: []byte{unix.IPPROTO_TCP}},
		load(expr.PayloadBaseNetworkHeader, local, f.length, first),
		load(expr.PayloadBaseTransportHeader, localPort, 2, first+words),
		load(expr.PayloadBaseNetworkHeader, remote, f.length, first+words+1),
		load(expr.PayloadBaseTransportHeader, remotePort, 2, first+2*words+1),
		&expr.Lookup{SourceRegister: first, SetName: set.Name, SetID: set.ID},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}
