// SPDX-License-Identifier: Apache-2.0

// System V objects.   sysv attached|detached|sem|msg
// attached: a segment that stays attached, as PostgreSQL's; detached: one that is attached for each use.
#include "say.h"
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define KEY (4711 + *kind) // one for each kind

int main(int argc, char **argv)
{
	const char *kind = argc > 1 ? argv[1] : "attached";
	int *p = NULL, id = -1;
	struct { long type; int n; } m = { 1, 0 };
	if (!strcmp(kind, "attached") || !strcmp(kind, "detached")) {
		if ((id = shmget(KEY, 4096, IPC_CREAT | 0600)) < 0) die("shmget");
		if (*kind == 'a' && (p = shmat(id, NULL, 0)) == (void *)-1) die("shmat");
	} else if (!strcmp(kind, "sem")) {
		if ((id = semget(KEY, 1, IPC_CREAT | 0600)) < 0) die("semget");
	} else if ((id = msgget(KEY, IPC_CREAT | 0600)) < 0 || msgsnd(id, &m, sizeof m.n, 0)) {
		die("msgget");
	}
	for (int n = 1;; n++, sleep(1)) {
		int have = -1;
		if (*kind == 'a') {
			have = ++*p;
		} else if (*kind == 'd') {
			int *q = shmat(id, NULL, 0);
			if (q != (void *)-1) { have = ++*q; shmdt(q); }
		} else if (*kind == 's') {
			struct sembuf up = { 0, 1, 0 };
			if (!semop(id, &up, 1)) have = semctl(id, 0, GETVAL);
		} else if (msgrcv(id, &m, sizeof m.n, 1, IPC_NOWAIT) >= 0) {
			have = ++m.n;
			msgsnd(id, &m, sizeof m.n, 0);
		}
		if (have != n) say("FAIL %s: it has %d, not %d (%s)", kind, have, n, have < 0 ? strerror(errno) : "lost");
		else say("round %d %s", n, kind);
	}
}
