// SPDX-License-Identifier: Apache-2.0

// A file that a long-running program holds, in DIR.   files hardlink|elsewhere|renamed|ghost|log|locked|leased|bytes|mapped DIR
// hardlink: its name is gone, another one is left. elsewhere: its directory is gone, too. renamed: as logrotate does. ghost: no name is left. log: another
// program appends to it, too. locked: with a lock of each kind. leased: with a lease, whose break would kill it. bytes:
// its name is not UTF-8. mapped: it is mapped and was replaced, as a library by an upgrade.
#define _GNU_SOURCE
#include "say.h"
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>

static int is_free(const char *path)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	int f = open(path, O_RDWR), free = 0;
	if (f < 0) return 1;
	if (!flock(f, LOCK_EX | LOCK_NB)) free = 1;
	if (fcntl(f, F_OFD_GETLK, &l) || l.l_type == F_UNLCK) free = 1;
	close(f);
	return free;
}

int main(int argc, char **argv)
{
	char a[200], b[200], dir[200], line[32];
	if (argc != 3) { say("usage: files KIND DIR"); return 2; }
	const char *k = argv[1];
	snprintf(a, sizeof a, strcmp(k, "bytes") ? "%s/%s.1" : "%s/%s\xff\xfe.1", argv[2], k);
	snprintf(b, sizeof b, "%s/%s.2", argv[2], k);
	int elsewhere = !strcmp(k, "elsewhere");
	if (elsewhere) {
		snprintf(dir, sizeof dir, "%s/gone", argv[2]);
		snprintf(a, sizeof a, "%s/gone/%s.1", argv[2], k);
		if (mkdir(dir, 0700)) die("mkdir");
	}
	int log = !strcmp(k, "log"), kept = elsewhere || !strcmp(k, "hardlink") || !strcmp(k, "renamed");
	int f = open(a, O_CREAT | (log ? O_WRONLY | O_APPEND : O_RDWR), 0600);
	if (f < 0) die("open");
	if ((elsewhere || !strcmp(k, "hardlink")) && (link(a, b) || unlink(a))) die("link");
	if (elsewhere && rmdir(dir)) die("rmdir");
	if (!strcmp(k, "renamed") && rename(a, b)) die("rename");
	if (!strcmp(k, "ghost") && unlink(a)) die("unlink");
	if (!strcmp(k, "locked")) {
		struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1 };
		if (flock(f, LOCK_EX) || fcntl(f, F_OFD_SETLK, &l)) die("lock");
	}
	if (!strcmp(k, "leased") && fcntl(f, F_SETLEASE, F_WRLCK)) die("lease");
	const char *map = NULL;
	if (!strcmp(k, "mapped")) {
		if (write(f, "mapped", 7) != 7 || (map = mmap(NULL, 7, PROT_READ, MAP_PRIVATE, f, 0)) == MAP_FAILED) die("map");
		int n = open(b, O_CREAT | O_RDWR, 0600);
		if (n < 0 || write(n, "new", 4) != 4 || rename(b, a)) die("replace");
		close(f);
		f = n;
	}
	off_t size = map ? 4 : 0;
	for (int n = 1;; n++, sleep(1)) {
		struct stat own, named;
		int len = snprintf(line, sizeof line, "%d\n", n);
		if (write(f, line, len) != len) say("FAIL write: %s", strerror(errno));
		size += len;
		if (fstat(f, &own) || (log ? own.st_size < size : own.st_size != size)) say("FAIL it has %ld bytes, not %ld", (long)own.st_size, (long)size);
		if (kept && (stat(b, &named) || named.st_ino != own.st_ino || named.st_size != size)) say("FAIL %s is not the file", b);
		if (kept && !access(a, F_OK)) say("FAIL %s is back", a);
		if (map && strcmp(map, "mapped")) say("FAIL it is mapped as %.6s", map);
		if (!strcmp(k, "bytes") && (stat(a, &named) || named.st_ino != own.st_ino)) say("FAIL its name is gone");
		if (!strcmp(k, "locked") && is_free(a)) say("FAIL the lock is gone");
		if (!strcmp(k, "leased") && fcntl(f, F_GETLEASE) != F_WRLCK) say("FAIL the lease is gone");
		say("round %d %s", n, k);
	}
}
