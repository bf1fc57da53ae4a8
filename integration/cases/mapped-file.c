// SPDX-License-Identifier: Apache-2.0

// Two processes share the pages of a file, each by a mapping of its own, as SQLite's do its index. What
// one has written there before it says so in memory is there for the other.   mapped-file DIR
#include "say.h"
#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>

#define PAGES 64
#define SIZE 4096

static volatile unsigned long *map(const char *path, int flags)
{
	int fd = open(path, O_RDWR | flags, 0600);
	if (fd < 0 || ftruncate(fd, PAGES * SIZE)) die(path);
	void *p = mmap(0, PAGES * SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED) die("mmap");
	close(fd);
	return p;
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%s/mapped-file", argc > 1 ? argv[1] : "/home");
	unlink(path);
	volatile unsigned long *file = map(path, O_CREAT);
	volatile unsigned long *said = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (said == MAP_FAILED) die("mmap");
	pid_t child = fork();
	if (child < 0) die("fork");
	if (!child) {
		volatile unsigned long *own = map(path, 0);
		for (unsigned long n = 1;; n++) {
			for (int i = 0; i < PAGES; i++) own[i * (SIZE / sizeof n)] = n;
			__sync_synchronize();
			*said = n;
			if (n % 16 == 0) usleep(1000);
		}
	}
	for (int round = 1, i = 0;; i++, usleep(5000)) {
		unsigned long least = *said;
		__sync_synchronize();
		for (int p = 0; p < PAGES; p++) {
			unsigned long have = file[p * (SIZE / sizeof have)];
			if (have < least) { say("FAIL page %d has %lu, and %lu was written", p, have, least); sleep(1); }
		}
		if (i % 200 == 0) say("round %d", round++);
	}
}
