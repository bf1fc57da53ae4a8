// SPDX-License-Identifier: Apache-2.0

// A FUSE file system that is served here and used by a child, which has its file open and mapped and reads it in every round.   fuse MOUNTPOINT
#define _GNU_SOURCE
#include "say.h"
#include <linux/fuse.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <fcntl.h>

static int fuse;
static char request[1 << 17];

static void reply(uint64_t unique, int error, const void *data, size_t size)
{
	char out[4096];
	struct fuse_out_header h = { sizeof h + size, error, unique };
	memcpy(out, &h, sizeof h);
	if (size) memcpy(out + sizeof h, data, size);
	if (write(fuse, out, sizeof h + size) < 0 && errno != ENOENT) die("reply");
}

static struct fuse_attr attributes(uint64_t node)
{
	struct fuse_attr a = { .ino = node, .nlink = 1, .mode = node == 1 ? S_IFDIR | 0755 : S_IFREG | 0666, .size = node == 1 ? 0 : 5 };
	return a;
}

static void serve(void)
{
	for (;;) {
		ssize_t n = read(fuse, request, sizeof request);
		struct fuse_in_header *h = (void *)request;
		if (n < 0 && (errno == EINTR || errno == ENOENT)) continue;
		if (n < 0) return; // unmounted
		switch (h->opcode) {
		case FUSE_INIT: {
			struct fuse_init_out i = { .major = 7, .minor = 31, .max_write = 4096, .max_readahead = 4096 };
			reply(h->unique, 0, &i, sizeof i);
			break;
		}
		case FUSE_GETATTR: { // valid for no time: each stat(2) asks
			struct fuse_attr_out a = { .attr = attributes(h->nodeid) };
			reply(h->unique, 0, &a, sizeof a);
			break;
		}
		case FUSE_LOOKUP: {
			struct fuse_entry_out e = { .nodeid = 2, .attr = attributes(2) };
			if (strcmp(request + sizeof *h, "file")) reply(h->unique, -ENOENT, 0, 0);
			else reply(h->unique, 0, &e, sizeof e);
			break;
		}
		case FUSE_OPEN: case FUSE_OPENDIR: {
			struct fuse_open_out o = { 0 };
			reply(h->unique, 0, &o, sizeof o);
			break;
		}
		case FUSE_READ:
			reply(h->unique, 0, "hello", ((struct fuse_read_in *)(h + 1))->offset ? 0 : 5);
			break;
		case FUSE_FLUSH: case FUSE_RELEASE: case FUSE_RELEASEDIR:
			reply(h->unique, 0, 0, 0);
			break;
		case FUSE_FORGET: case FUSE_BATCH_FORGET:
			break;
		default:
			reply(h->unique, -ENOSYS, 0, 0);
		}
	}
}

static _Noreturn void use(const char *dir)
{
	char path[4096], got[5];
	snprintf(path, sizeof path, "%s/file", dir);
	int fd = open(path, O_RDWR);
	if (fd < 0) die(path);
	if (mmap(0, 4096, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED) die("mmap");
	for (int n = 1;; n++, sleep(1)) {
		struct stat st;
		if (fstat(fd, &st) || st.st_size != 5) say("FAIL stat: %s", strerror(errno));
		if (pread(fd, got, 5, 0) != 5 || memcmp(got, "hello", 5)) say("FAIL read: %s", strerror(errno));
		say("round %d", n);
	}
}

int main(int argc, char **argv)
{
	char options[100];
	if (argc != 2) return 2;
	mknod("/dev/fuse", S_IFCHR | 0600, makedev(10, 229)); // if there is none
	if ((fuse = open("/dev/fuse", O_RDWR)) < 0) die("/dev/fuse");
	mkdir(argv[1], 0755);
	sprintf(options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fuse);
	if (mount("case", argv[1], "fuse", 0, options)) die("mount");
	if (!fork()) {
		close(fuse);
		use(argv[1]);
	}
	serve();
	return 0;
}
