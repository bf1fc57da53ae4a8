// SPDX-License-Identifier: Apache-2.0

// A file of /proc about somebody, open all the time.   proc-files self|thread|child|parent|ended|maps
// ended: of a child that is gone, from which nothing can be read. maps: its own, read from the start each time.
#include "say.h"
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static volatile int tid;

static void *other(void *arg)
{
	tid = syscall(SYS_gettid);
	for (;;) pause();
	return arg;
}

int main(int argc, char **argv)
{
	char path[100], text[4096], want[40];
	const char *k = argc > 1 ? argv[1] : "self", *file = "status";
	int pid = getpid(), task = 0;
	if (!strcmp(k, "parent")) pid = getppid();
	if (!strcmp(k, "maps")) file = k;
	if (!strcmp(k, "child") || !strcmp(k, "ended")) {
		if ((pid = fork()) < 0) die("fork");
		for (; !pid;) pause();
	}
	if (!strcmp(k, "thread")) {
		pthread_t t;
		if (pthread_create(&t, NULL, other, NULL)) die("thread");
		while (!tid) usleep(1000);
		task = tid;
	}
	if (task) snprintf(path, sizeof path, "/proc/%d/task/%d/%s", pid, task, file);
	else snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
	int f = open(path, O_RDONLY);
	if (f < 0) die(path);
	if (!strcmp(k, "ended") && (kill(pid, SIGKILL) || waitpid(pid, NULL, 0) != pid)) die("kill");
	snprintf(want, sizeof want, "\nPid:\t%d\n", task ? task : pid);
	for (int n = 1;; n++, sleep(1)) {
		int len = lseek(f, 0, SEEK_SET) ? -1 : read(f, text, sizeof text - 1);
		text[len < 0 ? 0 : len] = 0;
		if (!strcmp(k, "ended") ? len >= 0 || errno != ESRCH : len <= 0) say("FAIL read: %d, %s", len, strerror(errno));
		else if (file[0] == 's' && strcmp(k, "ended") && !strstr(text, want)) say("FAIL it is of another process: %.300s", text);
		say("round %d %s", n, k);
	}
}
