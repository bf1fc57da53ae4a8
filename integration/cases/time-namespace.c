// SPDX-License-Identifier: Apache-2.0

// A time namespace, in which a child is (own), or in which the next one would be (children).   time-namespace own|children
#define _GNU_SOURCE
#include "say.h"
#include <sched.h>
#include <sys/wait.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif

int main(int argc, char **argv)
{
	if (argc != 2) { say("usage: time-namespace own|children"); return 2; }
	if (unshare(CLONE_NEWTIME)) die("unshare");
	pid_t child = strcmp(argv[1], "own") ? 0 : fork();
	if (child < 0) die("fork");
	if (child > 0) return wait(NULL) < 0;
	for (int n = 1;; n++, sleep(1)) say("round %d", n);
}
