// SPDX-License-Identifier: Apache-2.0

// Named POSIX semaphore that this program has made (sem_open), with its name still there, or removed at once as
// Python's multiprocessing does.   named-sem keep|unlink|read NAME
#include "say.h"
#include <fcntl.h>
#include <semaphore.h>
#include <sys/wait.h>

// same reports whether a new sem_open finds the semaphore. In the process that has made it sem_open would not ask the
// file system.
static int same(sem_t *s, const char *name)
{
	int status, v = -1;
	pid_t child = fork();
	if (!child) {
		execl("/proc/self/exe", "named-sem", "read", name, NULL);
		_exit(1);
	}
	return waitpid(child, &status, 0) == child && WIFEXITED(status) && !sem_getvalue(s, &v) && WEXITSTATUS(status) == (v & 127);
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "read")) {
		int v = -1;
		sem_t *s = sem_open(argv[2], 0);
		return s == SEM_FAILED || sem_getvalue(s, &v) ? 128 : v & 127;
	}
	int gone = argc > 1 && !strcmp(argv[1], "unlink");
	const char *name = gone ? "/case-gone" : "/case";
	sem_t *s = sem_open(name, O_CREAT | O_EXCL, 0600, 0);
	if (s == SEM_FAILED) die("sem_open");
	if (gone && sem_unlink(name)) die("sem_unlink");
	for (int n = 1;; n++, sleep(1)) {
		int v = -1;
		if (sem_post(s) || sem_getvalue(s, &v) || v != n) say("FAIL the semaphore has %d, not %d", v, n);
		else if (!gone && !same(s, name)) say("FAIL %s is another semaphore", name);
		else say("round %d", n);
	}
}
