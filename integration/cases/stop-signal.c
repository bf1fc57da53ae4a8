// SPDX-License-Identifier: Apache-2.0

// What a program does about SIGTERM: it blocks it and says when it is pending, or
// leaves it alone.
#include "say.h"
#include <signal.h>

int main(int argc, char **argv)
{
	sigset_t set, pending;
	int blocks = argc > 1 && !strcmp(argv[1], "blocked");
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	if (blocks && sigprocmask(SIG_BLOCK, &set, NULL)) die("sigprocmask");
	for (int n = 1, said = 0;; n++, sleep(1)) {
		sigpending(&pending);
		if (!said && sigismember(&pending, SIGTERM)) {
			say("SIGTERM is pending");
			said = 1;
		}
		say("round %d", n);
	}
}
