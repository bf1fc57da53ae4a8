// SPDX-License-Identifier: Apache-2.0

// Something that only its own program could take away.   waiting accept|closed|corked|trap
#include "say.h"
#include <netinet/in.h>
#include <netinet/udp.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	const char *k = argc > 1 ? argv[1] : "accept";
	if (!strcmp(k, "corked")) {
		struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(4711), .sin_addr = { htonl(INADDR_LOOPBACK) } };
		int fd = socket(AF_INET, SOCK_DGRAM, 0), on = 1;
		if (fd < 0 || connect(fd, (void *)&a, sizeof a) || setsockopt(fd, IPPROTO_UDP, UDP_CORK, &on, sizeof on) || write(fd, "data", 4) != 4) die(k);
	} else if (!strcmp(k, "trap")) {
		sigset_t s;
		sigemptyset(&s);
		sigaddset(&s, SIGTRAP);
		if (sigprocmask(SIG_BLOCK, &s, NULL) || raise(SIGTRAP)) die(k);
	} else {
		struct sockaddr_un a = { .sun_family = AF_UNIX, .sun_path = "\0waiting" };
		int l = socket(AF_UNIX, SOCK_STREAM, 0), c = socket(AF_UNIX, SOCK_STREAM, 0);
		if (l < 0 || c < 0 || bind(l, (void *)&a, sizeof a) || listen(l, 4) || connect(c, (void *)&a, sizeof a) || write(c, "data", 4) != 4) die(k);
		if (!strcmp(k, "closed")) close(c);
	}
	for (int n = 1;; n++, sleep(1)) say("round %d %s", n, k);
}
