// SPDX-License-Identifier: Apache-2.0

// What CRIU restores as something else, or not at all.
//   apart descriptors|directory   a thread that does not share them
//   apart deadline                SCHED_DEADLINE
//   apart pressure                waits for memory pressure
#define _GNU_SOURCE
#include "say.h"
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>

static const char *kind;
static volatile int ready;

static void *apart(void *unused)
{
	if (unshare(!strcmp(kind, "directory") ? CLONE_FS : CLONE_FILES)) die("unshare");
	ready = 1;
	for (;;) pause();
	return unused;
}

int main(int argc, char **argv)
{
	kind = argc > 1 ? argv[1] : "descriptors";
	if (!strcmp(kind, "deadline")) {
		struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; } a =
			{ .size = 48, .policy = 6, .runtime = 1000000, .deadline = 100000000, .period = 100000000 };
		if (syscall(SYS_sched_setattr, 0, &a, 0)) die("sched_setattr");
	} else if (!strcmp(kind, "pressure")) {
		int fd = open("/proc/pressure/memory", O_RDWR);
		if (fd < 0 || write(fd, "some 150000 2000000", 20) < 0) die("pressure");
	} else {
		pthread_t t;
		if (pthread_create(&t, NULL, apart, NULL)) die("pthread_create");
		while (!ready) usleep(1000);
	}
	for (int n = 1;; n++, sleep(1)) say("round %d", n);
}
