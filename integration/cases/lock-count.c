// SPDX-License-Identifier: Apache-2.0

// Three processes count in one file, each time with a lock on it that lets in one of them only, as
// SQLite's writers do. No count is lost.   lock-count posix|ofd|flock DIR
#define _GNU_SOURCE
#include "say.h"
#include <fcntl.h>
#include <limits.h>
#include <sys/file.h>
#include <sys/mman.h>

#define WRITERS 3

static int lock(const char *kind, int fd, int on)
{
	struct flock l = { .l_type = on ? F_WRLCK : F_UNLCK, .l_start = 120, .l_len = 1 };
	if (!strcmp(kind, "flock")) return flock(fd, on ? LOCK_EX | LOCK_NB : LOCK_UN);
	return fcntl(fd, strcmp(kind, "ofd") ? F_SETLK : F_OFD_SETLK, &l);
}

int main(int argc, char **argv)
{
	const char *kind = argc > 1 ? argv[1] : "posix";
	char path[PATH_MAX];
	snprintf(path, sizeof path, "%s/lock-count-%s", argc > 2 ? argv[2] : "/home", kind);
	unlink(path);
	volatile unsigned long *counted = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	unsigned long have = 0, before = 0;
	int fd = open(path, O_RDWR | O_CREAT, 0600);
	if (counted == MAP_FAILED || fd < 0 || pwrite(fd, &have, sizeof have, 0) != sizeof have) die(path);
	for (int w = 0; w < WRITERS; w++) {
		pid_t child = fork();
		if (child < 0) die("fork");
		if (child) continue;
		// SQLite maps the file that has its locks.
		if ((fd = open(path, O_RDWR)) < 0 || mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED) die(path);
		for (;; usleep(500)) {
			unsigned long n;
			while (lock(kind, fd, 1)) usleep(200);
			if (pread(fd, &n, sizeof n, 0) != sizeof n) { say("FAIL read: %s", strerror(errno)); sleep(1); }
			usleep(100); // somebody else would count the same
			n++;
			if (pwrite(fd, &n, sizeof n, 0) != sizeof n) { say("FAIL write: %s", strerror(errno)); sleep(1); }
			counted[w]++;
			lock(kind, fd, 0);
		}
	}
	for (int round = 1, progress = 1;; round++, sleep(1)) {
		unsigned long sum = 0;
		while (lock(kind, fd, 1)) usleep(200);
		for (int w = 0; w < WRITERS; w++) sum += counted[w];
		if (pread(fd, &have, sizeof have, 0) != sizeof have || have != sum) say("FAIL %lu were counted, and the file has %lu", sum, have);
		lock(kind, fd, 0);
		if (sum > before) progress = round;
		else if (round > progress + 5) say("FAIL nobody counts");
		before = sum;
		say("round %d", round);
	}
}
