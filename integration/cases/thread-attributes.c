// SPDX-License-Identifier: Apache-2.0

// What CRIU leaves out of its images of threads: timer slack and I/O priority, of
// the main thread and of another one.
#define _GNU_SOURCE
#include "say.h"
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

static const int slacks[] = { 123456, 98765 }, priorities[] = { 2 << 13 | 6, 3 << 13 };

static void change(int thread)
{
	if (prctl(PR_SET_TIMERSLACK, slacks[thread])) die("timer slack");
	if (syscall(SYS_ioprio_set, 1, 0, priorities[thread])) die("I/O priority");
}

static void check(int thread)
{
	int slack = prctl(PR_GET_TIMERSLACK);
	long priority = syscall(SYS_ioprio_get, 1, 0);
	if (slack != slacks[thread]) say("FAIL thread %d has the timer slack %d", thread, slack);
	if (priority != priorities[thread]) say("FAIL thread %d has the I/O priority %ld", thread, priority);
}

static void *other(void *unused)
{
	for (change(1);; sleep(1)) check(1);
	return unused;
}

int main(void)
{
	pthread_t t;
	change(0);
	if (pthread_create(&t, NULL, other, NULL)) die("pthread_create");
	for (int n = 1;; n++, sleep(1)) {
		check(0);
		say("round %d", n);
	}
}
