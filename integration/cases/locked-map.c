// SPDX-License-Identifier: Apache-2.0

// Locks of a file that is mapped as well, as of SQLite's write-ahead log.
//   locked-map DIRECTORY
#define _GNU_SOURCE
#include "say.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>

static char path[4096];

// Whether another process may lock a byte.
static int free_for(int type, int at)
{
	int status = 0;
	pid_t child = fork();
	if (!child) {
		struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1 };
		int fd = open(path, O_RDWR);
		_exit(fd < 0 ? 2 : fcntl(fd, F_SETLK, &l) == 0);
	}
	if (child < 0 || waitpid(child, &status, 0) != child || WEXITSTATUS(status) == 2) die("child");
	return WEXITSTATUS(status);
}

int main(int argc, char **argv)
{
	snprintf(path, sizeof path, "%s/locked-map", argc > 1 ? argv[1] : "/tmp");
	struct flock write = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 120, .l_len = 1 };
	struct flock read = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 128, .l_len = 1 };
	int fd = open(path, O_RDWR | O_CREAT, 0600);
	if (fd < 0 || ftruncate(fd, 32768)) die(path);
	volatile char *shared = mmap(NULL, 32768, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (shared == MAP_FAILED) die("mmap");
	if (fcntl(fd, F_SETLK, &write) || fcntl(fd, F_SETLK, &read)) die("lock");
	for (int n = 1;; n++, sleep(1)) {
		shared[0] = n;
		if (free_for(F_WRLCK, 120) || free_for(F_RDLCK, 120)) say("FAIL the lock for writing is lost");
		if (free_for(F_WRLCK, 128)) say("FAIL the lock for reading is lost");
		if (!free_for(F_RDLCK, 128) || !free_for(F_WRLCK, 0)) say("FAIL something else is locked");
		say("round %d", n);
	}
}
