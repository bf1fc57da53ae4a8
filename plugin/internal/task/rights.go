// SPDX-License-Identifier: Apache-2.0

package task

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// rightsIn returns the rights that a spec gives a container.
func rightsIn(spec *specs.Spec) *imageset.Rights {
	r := &imageset.Rights{}
	if p := spec.Process; p != nil {
		r.UID, r.GID, r.Groups, r.NoNewPrivs = p.User.UID, p.User.GID, p.User.AdditionalGids, p.NoNewPrivileges
		if c := p.Capabilities; c != nil {
			r.Capabilities = &imageset.Capabilities{Bounding: c.Bounding, Effective: c.Effective, Permitted: c.Permitted, Inheritable: c.Inheritable, Ambient: c.Ambient}
		}
	}
	if l := spec.Linux; l != nil {
		r.Seccomp = l.Seccomp != nil
		r.MaskedPaths, r.ReadonlyPaths = paths(l.MaskedPaths), paths(l.ReadonlyPaths)
		for _, n := range l.Namespaces {
			r.Namespaces = append(r.Namespaces, string(n.Type))
		}
		slices.Sort(r.Namespaces)
		r.Namespaces = slices.Compact(r.Namespaces)
	}
	return r
}

// processor matches the number of a processor: engines mask a directory of each
// that the host has.
var processor = regexp.MustCompile(`/cpu[0-9]+/`)

// paths returns a sorted list in which all processors are one.
func paths(list []string) []string {
	out := make([]string, 0, len(list))
	for _, p := range list {
		out = append(out, processor.ReplaceAllLiteralString(p, "/cpu*/"))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// exceeding returns what a container had in excess of another one, whose place
// its processes are to take with all that they had.
func exceeding(had, has *imageset.Rights) (errs []string) {
	add := func(format string, args ...any) { errs = append(errs, fmt.Sprintf(format, args...)) }
	if has.UID != 0 {
		if had.UID != has.UID {
			add("it ran as the user %d and this container runs as %d", had.UID, has.UID)
		}
		allowed := append([]uint32{has.GID}, has.Groups...)
		for _, g := range append([]uint32{had.GID}, had.Groups...) {
			if !slices.Contains(allowed, g) {
				add("it had the group %d, which this container lacks", g)
			}
		}
	}
	errs = append(errs, exceedingCapabilities(had.Capabilities, has.Capabilities)...)
	if has.NoNewPrivs && !had.NoNewPrivs {
		add("it could gain privileges and this container cannot (no_new_privs, allowPrivilegeEscalation)")
	}
	if has.Seccomp && !had.Seccomp {
		add("it had no seccomp profile and this container has one")
	}
	if more := without(has.MaskedPaths, had.MaskedPaths); len(more) > 0 {
		add("it saw what is masked in this container: %s", strings.Join(more, ", "))
	}
	if more := without(has.ReadonlyPaths, slices.Concat(had.ReadonlyPaths, had.MaskedPaths)); len(more) > 0 {
		add("it could write to what is read-only in this container: %s", strings.Join(more, ", "))
	}
	if more := without(has.Namespaces, had.Namespaces); len(more) > 0 {
		add("it was in the guest's own namespaces of the types %s and this container is not", strings.Join(more, ", "))
	}
	return errs
}

func exceedingCapabilities(had, has *imageset.Capabilities) (errs []string) {
	switch {
	case had == nil && has == nil:
		return nil
	case had == nil:
		return []string{"its capabilities were not limited and this container's are"}
	case has == nil: // then Kata may give it none
		has = &imageset.Capabilities{}
	}
	var told []string
	for _, set := range []struct {
		name      string
		had, have []string
	}{
		{"", had.Bounding, has.Bounding},
		{" among the permitted", had.Permitted, has.Permitted},
		{" among the effective", had.Effective, has.Effective},
		{" among the inheritable", had.Inheritable, has.Inheritable},
		{" among the ambient", had.Ambient, has.Ambient},
	} {
		more := without(without(upper(set.had), upper(set.have)), told)
		if len(more) > 0 {
			told = append(told, more...)
			errs = append(errs, fmt.Sprintf("it had %s%s, which this container lacks", strings.Join(more, ", "), set.name))
		}
	}
	return errs
}

func upper(names []string) []string {
	out := make([]string, 0, len(names))
	for _, n := range names {
		out = append(out, strings.ToUpper(n))
	}
	return out
}

// without returns the elements of a list that are not in another one.
func without(list, other []string) (out []string) {
	for _, e := range list {
		if !slices.Contains(other, e) {
			out = append(out, e)
		}
	}
	return out
}
