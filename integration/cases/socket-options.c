// SPDX-License-Identifier: Apache-2.0

// Options of sockets that CRIU does not know: of a listening and of a connected socket of TCP, and of
// one of UDP that is in a multicast group, whose datagrams arrive.   socket-options
#include "say.h"
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#define GROUP "239.77.0.1"
#define PORT 7701

static struct { const char *name; int level, option, value; } tcp[] = {
	{ "TCP_USER_TIMEOUT", IPPROTO_TCP, TCP_USER_TIMEOUT, 123456 },
	{ "TCP_NOTSENT_LOWAT", IPPROTO_TCP, 25, 16384 },
	{ "TCP_SYNCNT", IPPROTO_TCP, TCP_SYNCNT, 3 },
}, udp[] = {
	{ "IP_RECVTTL", IPPROTO_IP, IP_RECVTTL, 1 },
	{ "IP_MTU_DISCOVER", IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO },
	{ "IP_MULTICAST_TTL", IPPROTO_IP, IP_MULTICAST_TTL, 7 },
};
#define EACH(i, a) for (unsigned i = 0; i < sizeof a / sizeof *a; i++)

static int check(int fd, const char *name, int level, int option, int want)
{
	int have = -1;
	socklen_t len = sizeof have;
	if (!getsockopt(fd, level, option, &have, &len) && have == want) return 0;
	say("FAIL %s is %d, not %d", name, have, want);
	return 1;
}

int main(void)
{
	int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0), u = socket(AF_INET, SOCK_DGRAM, 0), s;
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) }, g = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	socklen_t len = sizeof a;
	if (l < 0 || bind(l, (void *)&a, sizeof a) || listen(l, 1) || getsockname(l, (void *)&a, &len) || connect(c, (void *)&a, sizeof a) || (s = accept(l, 0, 0)) < 0) die("tcp");
	EACH(i, tcp) if (setsockopt(l, tcp[i].level, tcp[i].option, &tcp[i].value, sizeof(int)) || setsockopt(c, tcp[i].level, tcp[i].option, &tcp[i].value, sizeof(int))) die(tcp[i].name);
	struct ip_mreqn m = { .imr_ifindex = if_nametoindex("lo") };
	inet_pton(AF_INET, GROUP, &m.imr_multiaddr);
	if (u < 0 || bind(u, (void *)&g, sizeof g) || setsockopt(u, IPPROTO_IP, IP_ADD_MEMBERSHIP, &m, sizeof m)) die("udp");
	EACH(i, udp) if (setsockopt(u, udp[i].level, udp[i].option, &udp[i].value, sizeof(int))) die(udp[i].name);
	g.sin_addr = m.imr_multiaddr;
	for (int n = 1;; n++, sleep(1)) {
		int failed = 0;
		EACH(i, tcp) failed += check(l, tcp[i].name, tcp[i].level, tcp[i].option, tcp[i].value) + check(c, tcp[i].name, tcp[i].level, tcp[i].option, tcp[i].value);
		EACH(i, udp) failed += check(u, udp[i].name, udp[i].level, udp[i].option, udp[i].value);
		struct pollfd p = { .fd = u, .events = POLLIN };
		int arrived = 0;
		for (int tries = 0; !arrived && tries < 5; tries++) { // what is not read yet at a checkpoint is lost
			int from = socket(AF_INET, SOCK_DGRAM, 0);
			struct ip_mreqn via = { .imr_ifindex = m.imr_ifindex };
			if (setsockopt(from, IPPROTO_IP, IP_MULTICAST_IF, &via, sizeof via) || sendto(from, "x", 1, 0, (void *)&g, sizeof g) != 1) say("FAIL send: %s", strerror(errno));
			close(from);
			char b;
			arrived = poll(&p, 1, 1000) == 1 && recv(u, &b, 1, 0) == 1;
		}
		if (!arrived) { say("FAIL nothing arrives for the group " GROUP); failed++; }
		if (!failed) say("round %d", n);
	}
}
