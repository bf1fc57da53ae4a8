// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// waiting finds connections of unix sockets that have not been accepted and that
// CRIU cannot dump (criu/sk-unix.c, dump_one_unix_fd): nobody can read what their
// clients have sent. One without data it connects again, if the listener is in
// the image set as well.
func (c *Container) waiting() (out []Finding) {
	const again = "repeat the checkpoint once it has been accepted"
	for _, inode := range slices.Sorted(maps.Keys(c.sockets.unix)) {
		listener, known := c.sockets.owners[inode]
		for _, number := range c.sockets.unix[inode].pending {
			client, ours := c.sockets.owners[number]
			ours = ours && !client.process.Exec
			switch {
			case number == 0 && known && !listener.process.Exec:
				out = append(out, c.finding(listener.process, rule{Refused, errcode.SocketBusy, "has not accepted a connection of a unix socket yet that its client has closed again, which CRIU cannot checkpoint", again}))
			case !ours:
				// It is lost, as other connections to outside that wait.
			case !known:
				out = append(out, c.finding(client.process, rule{Refused, errcode.UnixSocket, "has a unix socket that is connected to outside of the container, where the connection waits to be accepted", "close the connection before the checkpoint"}))
			case listener.process.Exec:
				out = append(out, c.finding(client.process, rule{Refused, errcode.ExecPeer, "has a unix socket that is connected to " + c.ofExec(listener.process), endExec}))
			case c.sockets.unix[number].unsent:
				out = append(out, c.finding(client.process, rule{Refused, errcode.SocketBusy, "has sent data to a unix socket that has not accepted its connection yet, which CRIU cannot checkpoint", again}))
			}
		}
	}
	return out
}

// senderOptions have the kernel say who has sent a message, or when, of which CRIU
// has no image (criu/sk-queue.c, dump_packet_cmsg).
var senderOptions = map[string]int{
	"SO_PASSCRED":    unix.SO_PASSCRED,
	"SO_PASSSEC":     unix.SO_PASSSEC,
	"SO_PASSPIDFD":   unix.SO_PASSPIDFD,
	"SO_TIMESTAMP":   unix.SO_TIMESTAMP,
	"SO_TIMESTAMPNS": unix.SO_TIMESTAMPNS,
}

// unreadMessages finds the rule for a unix socket with unread messages.
func unreadMessages(socket int) rule {
	for _, name := range slices.Sorted(maps.Keys(senderOptions)) {
		if set, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, senderOptions[name]); err == nil && set != 0 {
			return rule{Refused, errcode.SocketBusy, "has a unix socket with the option " + name + " and messages that it has not read, which CRIU cannot checkpoint", readFirst}
		}
	}
	return rule{}
}

// readFirst is the advice for a socket with unread messages.
const readFirst = "repeat the checkpoint once it has read them"

// hasUnread reports whether there is something to read, without reading it.
func hasUnread(socket int) bool {
	p := []unix.PollFd{{Fd: int32(socket), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&unix.POLLIN != 0
}
