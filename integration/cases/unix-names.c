// SPDX-License-Identifier: Apache-2.0

// Listening unix sockets in DIR, each with a client that connects again in every round.   unix-names direct|renamed|linked DIR
// renamed and linked: the name is not the one that it was bound to, as with supervisord and haproxy.
#include "say.h"
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	if (argc != 3) { say("usage: unix-names KIND DIR"); return 2; }
	const char *k = argv[1];
	struct sockaddr_un bound = { .sun_family = AF_UNIX }, name = bound;
	snprintf(name.sun_path, sizeof name.sun_path, "%s/%s.sock", argv[2], k);
	snprintf(bound.sun_path, sizeof bound.sun_path, strcmp(k, "direct") ? "%s/%s.sock.tmp" : "%s/%s.sock", argv[2], k);
	int l = socket(AF_UNIX, SOCK_STREAM, 0);
	if (l < 0 || bind(l, (void *)&bound, sizeof bound) || listen(l, 5)) die("bind");
	if (!strcmp(k, "renamed") && rename(bound.sun_path, name.sun_path)) die("rename");
	if (!strcmp(k, "linked") && (link(bound.sun_path, name.sun_path) || unlink(bound.sun_path))) die("link");
	for (int n = 1;; n++, sleep(1)) {
		int have = 0, c = socket(AF_UNIX, SOCK_STREAM, 0), s;
		if (connect(c, (void *)&name, sizeof name)) {
			say("FAIL connect to %s: %s", name.sun_path, strerror(errno));
		} else if ((s = accept(l, NULL, NULL)) < 0 || write(s, &n, sizeof n) != sizeof n || read(c, &have, sizeof have) != sizeof have || have != n) {
			say("FAIL %s", strerror(errno));
		} else {
			close(s);
		}
		close(c);
		if (strcmp(k, "direct") && !access(bound.sun_path, F_OK)) say("FAIL %s is back", bound.sun_path);
		say("round %d %s", n, k);
	}
}
