// SPDX-License-Identifier: Apache-2.0

/*
 * kata-checkpoint-helper: both ends of an exec into a restored container.
 * Kata starts "exec TOKEN" in the placeholder's namespaces: it holds the exec's
 * stdio and exit status and passes signals on. The agent starts "enter" in the
 * guest's: it joins the container's namespaces and becomes the command, or
 * "init": it becomes PID 1 of a PID namespace below the placeholder's.
 *
 * It is C because only a process with a single thread can join a time namespace,
 * and because nothing may be executed between joining the PID namespace and the
 * command: an execve would make the process dumpable. See docs/exec.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* exec: the agent's side is package exechelper. */

enum {
	STATUS_FD = 200, /* the write end of the helper's pipe, for the agent to take */
	FAILURE = 254,	 /* exit status: the helper could not do its part */
	LOST = 255,	 /* exit status: the agent has gone, and the command's status with it */
};

struct message {
	int32_t pid; /* in the placeholder's PID namespace */
	uint32_t ended;
	uint32_t status; /* of wait(2) */
};

static int hold(void)
{
	int signals, ends[2], pid = 0;
	sigset_t all;

	/* The terminal is the command's, which could take it only from a session that
	 * has given it up. What the kernel sends then is for nobody. */
	signal(SIGHUP, SIG_IGN);
	ioctl(0, TIOCNOTTY);
	signal(SIGHUP, SIG_DFL);
	/* Blocked signals wait until there is a process to pass them on to. The
	 * C library's call would leave out two of them. */
	memset(&all, 0xff, sizeof(all));
	if (syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, _NSIG / 8) < 0)
		return FAILURE;
	signals = signalfd(-1, &all, SFD_CLOEXEC);
	if (signals < 0 || pipe2(ends, O_CLOEXEC) < 0 || dup3(ends[1], STATUS_FD, O_CLOEXEC) < 0)
		return FAILURE;
	close(ends[1]);
	/* The agent watches the file for this, and learns only that it can look. */
	close(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));

	for (;;) {
		struct pollfd fds[] = {{.fd = ends[0], .events = POLLIN}, {.fd = pid ? signals : -1, .events = POLLIN}};
		struct signalfd_siginfo info;
		struct message m;

		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return FAILURE;
		if (fds[0].revents) {
			if (read(ends[0], &m, sizeof(m)) != sizeof(m)) /* written in one piece */
				return LOST;
			if (m.ended)
				return WIFSIGNALED((int)m.status) ? 128 + WTERMSIG((int)m.status) : WEXITSTATUS((int)m.status);
			pid = m.pid;
			/* With the agent as the only writer, its end is an end of file. */
			close(STATUS_FD);
		}
		if (fds[1].revents && read(signals, &info, sizeof(info)) == sizeof(info) && info.ssi_signo != SIGCHLD)
			kill(pid, (int)info.ssi_signo); /* gone already, or told */
	}
}

/* enter: the agent's side is package enter. Descriptors 0 to 2 are the command's. */

enum {
	PLAN = 3, /* a file */
	REPORT,	  /* a pipe for the new pid and what fails; it ends when all is done */
	TARGET,	  /* a pidfd of a process in the container */
	CGROUP,	  /* the directory of the container's cgroup */
};

/* All but the user namespace, as Kata gives containers none, the network, which
 * is the guest's, and the cgroup namespace: once in it, a process could not
 * enter the cgroup any more, which an init has to. */
#define NAMESPACES (CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID | CLONE_NEWTIME)

static void report(const char *kind, int value, const char *text)
{
	char line[128];
	int n = snprintf(line, sizeof(line), "%s %d %s\n", kind, value, text);

	if (write(REPORT, line, (size_t)n) != n)
		_exit(FAILURE);
}

static _Noreturn void fail(const char *step)
{
	report("errno", errno, step);
	_exit(FAILURE);
}

static long need(long result, const char *step)
{
	if (result < 0)
		fail(step);
	return result;
}

/* The plan: strings, each with a zero byte at its end. A list has its length in front. */
static char *next, *end;

static void read_plan(void)
{
	struct stat st;

	need(fstat(PLAN, &st), "read the plan");
	next = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, PLAN, 0);
	if (next == MAP_FAILED)
		fail("read the plan");
	end = next + st.st_size;
}

static char *text(void)
{
	char *s = next, *zero = memchr(s, 0, (size_t)(end - s));

	errno = EBADMSG;
	if (!zero)
		fail("read the plan");
	next = zero + 1;
	return s;
}

static uint64_t number(void)
{
	return strtoull(text(), NULL, 10);
}

static char **texts(void)
{
	size_t count = number();
	char **list = calloc(count + 1, sizeof(*list));

	if (!list)
		fail("read the plan");
	for (size_t i = 0; i < count; i++)
		list[i] = text();
	return list; /* with a null at its end, as execve wants it */
}

/* The filters of seccomp(2), the first one first, with which the plan begins. */
static struct sock_fprog *filters;
static size_t filter_count;

static void read_filters(void)
{
	filter_count = number();
	filters = calloc(filter_count + 1, sizeof(*filters));
	if (!filters)
		fail("read the plan");
	for (size_t i = 0; i < filter_count; i++) {
		size_t length = number();
		struct sock_filter *program = calloc(length + 1, sizeof(*program));

		if (!program)
			fail("read the plan");
		for (size_t j = 0; j < length; j++) {
			uint64_t n = number();

			program[j].code = (uint16_t)(n >> 48);
			program[j].jt = (uint8_t)(n >> 40);
			program[j].jf = (uint8_t)(n >> 32);
			program[j].k = (uint32_t)n;
		}
		filters[i].len = (unsigned short)length; /* the kernel's limit is 4096 */
		filters[i].filter = program;
	}
}

static void set_filters(void)
{
	for (size_t i = 0; i < filter_count; i++)
		need(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &filters[i]), "set seccomp filters");
}

static pid_t clone3(uint64_t flags, uint64_t signal)
{
	struct clone_args args = {.flags = flags, .exit_signal = signal};

	if (flags & CLONE_INTO_CGROUP)
		args.cgroup = CGROUP;
	return (pid_t)need(syscall(SYS_clone3, &args, sizeof(args)), "fork in the container");
}

/* No process of the container may trace this one or look into it, unless it has
 * CAP_SYS_PTRACE. */
static void hide(void)
{
	need(prctl(PR_SET_DUMPABLE, 0L, 0L, 0L, 0L), "hide from the container");
}

/* Reports the pid of the process in which this one continues. */
static void continue_as(pid_t pid)
{
	if (pid > 0) {
		report("pid", pid, "");
		_exit(0);
	}
}

/* Continues as PID 1 of a PID namespace in that of the placeholder, where there is
 * nobody else yet. */
static void become_init(void)
{
	hide();
	need(syscall(SYS_setns, TARGET, NAMESPACES), "enter the container's namespaces");
	/* Only a process in a PID namespace can make one below it: that takes a fork
	 * more. These belong to the guest's init, as that of the target's PID
	 * namespace would take them for processes of the container. Born in its
	 * cgroup, as a move waits for a grace period of RCU. */
	if (clone3(CLONE_INTO_CGROUP, SIGCHLD) > 0)
		_exit(0);
	continue_as(clone3(CLONE_PARENT | CLONE_NEWPID, 0));
	need(syscall(SYS_setns, TARGET, CLONE_NEWCGROUP), "enter the container's cgroup namespace");
}

/* Continues as a new process, a child of the agent's, in the container's PID
 * namespace. From its birth it has no more than the command: a process of the
 * container with CAP_SYS_PTRACE can do with it as it likes. */
static void be_born(void)
{
	long pid;

	hide(); /* once more: a change of the user has undone it */
	/* Not clone3, which the filters of most containers do not allow. */
	pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0L, 0L, 0L, 0L);
	continue_as((pid_t)need(pid, "fork in the container"));
}

static void set_limits(void)
{
	for (size_t count = number(); count > 0; count--) {
		uint64_t resource = number(), soft = number(), hard = number();
		struct rlimit limit = {.rlim_cur = soft, .rlim_max = hard};

		need(setrlimit((int)resource, &limit), "set resource limits");
	}
}

static void set_groups(void)
{
	size_t count = number();
	gid_t *groups = calloc(count + 1, sizeof(*groups));

	if (!groups)
		fail("read the plan");
	for (size_t i = 0; i < count; i++)
		groups[i] = (gid_t)number();
	need(setgroups(count, groups), "set groups");
}

static void set_credentials(void)
{
	uid_t uid = (uid_t)number();
	gid_t gid = (gid_t)number();
	uint64_t bounding = number(), effective = number(), permitted = number();
	uint64_t inheritable = number(), ambient = number();
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];

	for (int i = 0; i < 2; i++) {
		data[i].effective = (uint32_t)(effective >> 32 * i);
		data[i].permitted = (uint32_t)(permitted >> 32 * i);
		data[i].inheritable = (uint32_t)(inheritable >> 32 * i);
	}
	need(setresgid(gid, gid, gid), "set the group");
	for (unsigned long i = 0; prctl(PR_CAPBSET_READ, i, 0L, 0L, 0L) >= 0; i++)
		if (!(bounding >> i & 1))
			need(prctl(PR_CAPBSET_DROP, i, 0L, 0L, 0L), "set capabilities");
	need(prctl(PR_SET_KEEPCAPS, 1L, 0L, 0L, 0L), "set capabilities");
	need(setresuid(uid, uid, uid), "set the user");
	need(syscall(SYS_capset, &header, data), "set capabilities");
	for (unsigned long i = 0; i < 64; i++)
		if (ambient >> i & 1)
			need(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0L, 0L), "set capabilities");
}

/* As execvp: a missing file is passed over, any other error counts. */
static _Noreturn void execute(void)
{
	char **paths = texts(), **argv = texts(), **envp = texts();
	int error = ENOENT;

	for (; *paths; paths++) {
		execve(*paths, argv, envp);
		if (errno != ENOENT && errno != ENOTDIR)
			error = errno;
	}
	errno = error;
	fail("exec");
}

static _Noreturn void become(int init)
{
	int fd, terminal, no_new_privileges;

	/* What else the agent may have open at the moment. */
	need(syscall(SYS_close_range, CGROUP + 1, ~0U, 0), "close descriptors");
	read_plan();
	read_filters();
	fd = (int)need(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC), "set the OOM score");
	need(dprintf(fd, "%s", text()), "set the OOM score");
	if (init) {
		become_init();
	} else {
		hide();
		/* The agent has started it in the container's cgroup. */
		need(syscall(SYS_setns, TARGET, NAMESPACES | CLONE_NEWCGROUP), "enter the container's namespaces");
	}
	need(fcntl(REPORT, F_SETFD, FD_CLOEXEC), "close descriptors");
	close(PLAN);
	need(syscall(SYS_close_range, TARGET, ~0U, 0), "close descriptors");
	terminal = (int)number();
	set_limits();
	need(chdir(text()), "change to the working directory");
	umask((mode_t)number());
	no_new_privileges = (int)number();
	/* Without no-new-privileges that takes a capability. Otherwise as late as
	 * possible: only what is left to do here has to be allowed. Kata does the same. */
	if (!no_new_privileges)
		set_filters();
	set_groups();
	set_credentials();
	if (no_new_privileges)
		need(prctl(PR_SET_NO_NEW_PRIVS, 1L, 0L, 0L, 0L), "set no-new-privileges");
	if (!init)
		be_born();
	need(setsid(), "make a session");
	if (terminal)
		need(ioctl(0, TIOCSCTTY, 0), "take the terminal");
	if (no_new_privileges)
		set_filters();
	if (!init)
		execute();
	/* The kernel reaps for who ignores SIGCHLD. The end is that of the placeholder. */
	signal(SIGCHLD, SIG_IGN);
	need(syscall(SYS_close_range, PLAN, ~0U, 0), "close descriptors");
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "exec") == 0)
		return hold();
	if (argc == 2 && (strcmp(argv[1], "enter") == 0 || strcmp(argv[1], "init") == 0))
		become(strcmp(argv[1], "init") == 0);
	fprintf(stderr, "usage: %s exec TOKEN | enter | init (Kata and the guest agent start it)\n", argv[0]);
	return FAILURE;
}
