// SPDX-License-Identifier: Apache-2.0

// A directory that a program holds and that was removed, in DIR.   directories cwd|open DIR
#include "say.h"
#include <fcntl.h>
#include <sys/stat.h>

int main(int argc, char **argv)
{
	char path[200], cwd[200];
	if (argc != 3) { say("usage: directories KIND DIR"); return 2; }
	const char *k = argv[1];
	snprintf(path, sizeof path, "%s/directory-%s", argv[2], k);
	int d = -1, is_cwd = !strcmp(k, "cwd");
	if (mkdir(path, 0700) || (is_cwd ? chdir(path) : (d = open(path, O_RDONLY | O_DIRECTORY)) < 0) || rmdir(path)) die(k);
	for (int n = 1;; n++, sleep(1)) {
		struct stat st;
		if (is_cwd ? stat(".", &st) : fstat(d, &st)) say("FAIL stat: %s", strerror(errno));
		else if (!S_ISDIR(st.st_mode) || st.st_nlink != 0) say("FAIL mode %o, %ld links", st.st_mode, (long)st.st_nlink);
		if (is_cwd && (getcwd(cwd, sizeof cwd) || errno != ENOENT)) say("FAIL it has a name");
		if (openat(is_cwd ? AT_FDCWD : d, "file", O_CREAT | O_RDWR, 0600) >= 0 || errno != ENOENT) say("FAIL a file can be made in it");
		if (!access(path, F_OK)) say("FAIL %s is back", path);
		say("round %d %s", n, k);
	}
}
