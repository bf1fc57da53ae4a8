// SPDX-License-Identifier: Apache-2.0

// Lines on stdout: "round N ..." once a second; "FAIL ..." when something is not as it was.
// $CASE stands before each, so that several programs can share one output.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <unistd.h>

static inline void say(const char *f, ...)
{
	const char *name = getenv("CASE");
	va_list a;
	if (name) printf("%s: ", name);
	va_start(a, f);
	vprintf(f, a);
	va_end(a);
	putchar('\n');
	fflush(stdout);
}

static inline void die(const char *what)
{
	say("SETUP %s: %s", what, strerror(errno));
	exit(2);
}
