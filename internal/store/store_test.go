// SPDX-License-Identifier: Apache-2.0

package store_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
	"github.com/kata-checkpoint/kata-checkpoint/internal/teststore"
)

func names(t *testing.T, s *store.Store) (out []string) {
	t.Helper()
	list, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		out = append(out, c.Name)
	}
	return out
}

// all are the names in the store's directory, hidden ones included.
func all(t *testing.T, s *store.Store) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func at(day int) store.Record {
	return store.Record{Engine: "containerd", Namespace: "default", Container: "c", Created: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC)}
}

func TestStore(t *testing.T) {
	s := store.New(teststore.Dir(t))
	if got := names(t, s); len(got) != 0 {
		t.Errorf("there is %v in a store that was never used", got)
	}
	teststore.Add(t, s, teststore.Checkpoint{Name: "b", Record: at(1)})
	a := teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: at(2), Memory: "memory"})
	if got := names(t, s); !slices.Equal(got, []string{"b", "a"}) {
		t.Errorf("listed as %v", got)
	}
	if a.Size == 0 || a.Container != "c" || len(a.Files) == 0 || a.Keep || a.Damage != nil {
		t.Errorf("%+v", a)
	}
	if err := a.Check(t.Context(), func(int64) {}); err != nil {
		t.Error(err)
	}
	if _, err := s.Begin("a"); !errors.Is(err, store.ErrExists) {
		t.Errorf("the same name: %v", err)
	}
	if _, err := s.Open("c"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("an unknown name: %v", err)
	}
	l, err := a.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(a); !errors.Is(err, store.ErrInUse) {
		t.Errorf("remove what is read: %v", err)
	}
	if err := errors.Join(l.Close(), s.Remove(a)); err != nil {
		t.Error(err)
	}
	if got := all(t, s); !slices.Equal(got, []string{"b"}) {
		t.Errorf("there is %v", got)
	}
}

func TestNames(t *testing.T) {
	s := store.New(teststore.Dir(t))
	for _, name := range []string{"", ".", "..", ".a", "a/b", "a..b", "-a", "a b", "a\n", strings.Repeat("a", 129), "ä"} {
		if _, err := s.Begin(name); err == nil {
			t.Errorf("%q is the name of a checkpoint", name)
		}
		if _, err := s.Open(name); err == nil {
			t.Errorf("%q is opened", name)
		}
	}
	for _, name := range []string{"a", "a.b-c_d", strings.Repeat("a", 128), "1"} {
		if err := store.CheckName(name); err != nil {
			t.Error(err)
		}
	}
}

// What a killed command has left is removed by the next, and what one that runs
// has is not.
func TestUnfinished(t *testing.T) {
	s := store.New(teststore.Dir(t))
	running, err := s.Begin("running")
	if err != nil {
		t.Fatal(err)
	}
	for _, left := range []string{".new-left", ".old-left"} {
		if err := os.MkdirAll(filepath.Join(s.Dir(), left, "checkpoint"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if got := names(t, s); len(got) != 0 {
		t.Errorf("listed: %v", got)
	}
	next, err := s.Begin("next")
	if err != nil {
		t.Fatal(err)
	}
	if got := all(t, s); len(got) != 2 || slices.ContainsFunc(got, func(n string) bool { return strings.HasSuffix(n, "left") }) {
		t.Errorf("there is %v", got)
	}
	if _, err := os.Stat(running.Images()); err != nil {
		t.Error(err)
	}
	if err := errors.Join(running.Abort(), next.Abort()); err != nil {
		t.Error(err)
	}
	if got := all(t, s); len(got) != 0 {
		t.Errorf("there is %v", got)
	}
}

// Of two that make the same checkpoint, one does.
func TestTwoDraftsOfAName(t *testing.T) {
	s := store.New(teststore.Dir(t))
	a, err := s.Begin("a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Begin("a")
	if err != nil {
		t.Fatal(err)
	}
	r := at(1)
	if err := a.Commit(t.Context(), &r); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(t.Context(), &r); !errors.Is(err, store.ErrExists) {
		t.Errorf("the second: %v", err)
	}
	if err := errors.Join(a.Abort(), b.Abort()); err != nil {
		t.Error(err)
	}
	if got := all(t, s); !slices.Equal(got, []string{"a"}) {
		t.Errorf("there is %v", got)
	}
}

func TestDamage(t *testing.T) {
	s := store.New(teststore.Dir(t))
	for name, tc := range map[string]struct {
		damage func(*store.Checkpoint) error
		want   string
	}{
		"a": {func(c *store.Checkpoint) error { return os.WriteFile(c.File(store.SpecName), []byte("{}"), 0o600) }, "spec.dump is damaged"},
		"b": {func(c *store.Checkpoint) error { return os.Remove(c.File(imageset.RootfsDiffName)) }, "rootfs-diff.tar is missing"},
		"c": {func(c *store.Checkpoint) error { return os.Remove(c.File(store.RecordName)) }, "record cannot be read"},
		"d": {func(c *store.Checkpoint) error { return os.WriteFile(c.File(store.RecordName), []byte("{"), 0o600) }, "record cannot be read"},
		"e": {func(c *store.Checkpoint) error {
			return os.WriteFile(c.File(store.RecordName), []byte(`{"version": 3}`), 0o600)
		}, "version 3"},
		"f-g": {func(c *store.Checkpoint) error { return os.Symlink("/etc/passwd", c.File("x")) }, ""},
	} {
		c := teststore.Add(t, s, teststore.Checkpoint{Name: name, Record: at(1)})
		if err := tc.damage(c); err != nil {
			t.Fatal(err)
		}
		c, err := s.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Check(t.Context(), func(int64) {}); tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	if got := names(t, s); len(got) != 6 {
		t.Errorf("listed: %v", got)
	}
}

func TestGroup(t *testing.T) {
	s := store.New(teststore.Dir(t))
	for _, name := range []string{"web", "app"} {
		r := at(1)
		r.Group, r.ContainerName, r.Pod = "g", name, &store.Pod{Namespace: "shop", Name: "p"}
		teststore.Add(t, s, teststore.Checkpoint{Name: "g-" + name, Record: r})
	}
	teststore.Add(t, s, teststore.Checkpoint{Name: "g-not", Record: at(1)})
	list, err := s.Group("g")
	if err != nil || len(list) != 2 || list[0].Of() != "shop/p/app" || list[1].Name != "g-web" {
		t.Errorf("%v, %v", list, err)
	}
	if list, err := s.Group(""); err != nil || len(list) != 0 {
		t.Errorf("no group has %v (%v)", list, err)
	}
}

func TestPrune(t *testing.T) {
	now := time.Date(2026, 1, 11, 0, 0, 0, 0, time.UTC)
	make5 := func() (list []*store.Checkpoint) {
		for day := 1; day <= 5; day++ {
			r := at(day)
			r.Name = fmt.Sprint(day)
			if day == 4 {
				r.Container = "other"
			}
			list = append(list, &store.Checkpoint{Record: &r, Size: 10})
		}
		return list
	}
	for name, tc := range map[string]struct {
		policy store.Policy
		change func([]*store.Checkpoint)
		want   string
		err    string
	}{
		"the newest of each container":  {policy: store.Policy{Count: 2}, want: "1 2"},
		"none is too many":              {policy: store.Policy{Count: 9}},
		"by age":                        {policy: store.Policy{Age: 8 * 24 * time.Hour}, want: "1 2"},
		"by size, the oldest first":     {policy: store.Policy{Bytes: 25}, want: "1 2 3"},
		"exactly as large as allowed":   {policy: store.Policy{Bytes: 50}},
		"size counts what age leaves":   {policy: store.Policy{Age: 8 * 24 * time.Hour, Bytes: 20}, want: "1 2 3"},
		"what is kept counts and stays": {policy: store.Policy{Count: 1, Bytes: 20}, change: func(l []*store.Checkpoint) { l[0].Keep = true }, want: "2 3 4"},
		"damaged ones stay":             {policy: store.Policy{Age: time.Hour}, change: func(l []*store.Checkpoint) { l[2].Damage = errors.New("x") }, want: "1 2 4 5"},
		"no policy":                     {err: "nothing says"},
		"a negative one":                {policy: store.Policy{Count: -1}, err: "greater than 0"},
	} {
		t.Run(name, func(t *testing.T) {
			list := make5()
			if tc.change != nil {
				tc.change(list)
			}
			pruned, err := tc.policy.Prune(list, now)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v", err)
				}
				return
			}
			var got []string
			for _, p := range pruned {
				got = append(got, p.Name)
				if p.Reason == "" {
					t.Errorf("%s is removed without a reason", p.Name)
				}
			}
			if err != nil || strings.Join(got, " ") != tc.want {
				t.Errorf("removes %v (%v), want %s", got, err, tc.want)
			}
		})
	}
}

func TestKeep(t *testing.T) {
	s := store.New(teststore.Dir(t))
	c := teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: at(1)})
	for _, keep := range []bool{true, true, false, false} {
		if err := c.SetKeep(keep); err != nil {
			t.Fatal(err)
		}
		if c, err := s.Open("a"); err != nil || c.Keep != keep {
			t.Errorf("kept: %v (%v), want %v", c.Keep, err, keep)
		}
	}
}
