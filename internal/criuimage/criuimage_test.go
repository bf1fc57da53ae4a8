// SPDX-License-Identifier: Apache-2.0

package criuimage_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/criuimage"
	"github.com/kata-checkpoint/kata-checkpoint/internal/teststore"
)

func reader(files map[string][]byte) func(string, int64) ([]byte, error) {
	return func(name string, limit int64) ([]byte, error) {
		data, ok := files[name]
		if !ok {
			return nil, errors.New(name + " is missing")
		}
		return data[:min(int64(len(data)), limit)], nil
	}
}

// outline is a tree in one line.
func outline(list []*criuimage.Process) string {
	var out []string
	for _, p := range list {
		s := fmt.Sprintf("%d:%s", p.PID, p.Name)
		if len(p.Children) > 0 {
			s += "(" + outline(p.Children) + ")"
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func TestTree(t *testing.T) {
	for name, tc := range map[string]struct {
		processes []teststore.Process
		change    func(map[string][]byte)
		want, err string
	}{
		"a tree":                          {processes: teststore.Processes, want: "1:init(7:worker(9:child) 8:logger)"},
		"a parent with a larger PID":      {processes: []teststore.Process{{PID: 3, Parent: 9, Name: "a"}, {PID: 9, Parent: 0, Name: "b"}}, want: "9:b(3:a)"},
		"a parent that is not in it":      {processes: []teststore.Process{{PID: 3, Parent: 2, Name: "a"}}, want: "3:a"},
		"a ring":                          {processes: []teststore.Process{{PID: 1, Parent: 0, Name: "i"}, {PID: 3, Parent: 4, Name: "a"}, {PID: 4, Parent: 3, Name: "b"}}, want: "1:i 3:a 4:b"},
		"its own parent":                  {processes: []teststore.Process{{PID: 3, Parent: 3, Name: "a"}}, want: "3:a"},
		"a name with a terminal's escape": {processes: []teststore.Process{{PID: 1, Parent: 0, Name: "a\x1b[31m"}}, want: "1:a?[31m"},
		"a PID twice":                     {processes: []teststore.Process{{PID: 1, Parent: 0, Name: "a"}, {PID: 1, Parent: 0, Name: "b"}}, err: "two processes with PID 1"},
		"no core image":                   {processes: teststore.Processes, change: func(f map[string][]byte) { delete(f, "core-7.img") }, err: "core-7.img is missing"},
		"another image in its place":      {processes: teststore.Processes, change: func(f map[string][]byte) { f["pstree.img"] = f["core-7.img"] }, err: "not an image"},
		"cut short":                       {processes: teststore.Processes, change: func(f map[string][]byte) { f["pstree.img"] = f["pstree.img"][:20] }, err: "cut short"},
		"no process":                      {processes: nil, err: "it is empty"},
		"no message": {processes: teststore.Processes, change: func(f map[string][]byte) {
			f["core-1.img"] = append(f["core-1.img"][:8], 4, 0, 0, 0, 255, 255, 255, 255)
		}, err: "core-1.img"},
	} {
		t.Run(name, func(t *testing.T) {
			files := teststore.Images(t, tc.processes, "")
			if tc.change != nil {
				tc.change(files)
			}
			got, err := criuimage.Tree(reader(files))
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want one with %q", err, tc.err)
				}
				return
			}
			if err != nil || outline(got) != tc.want {
				t.Errorf("%s (%v), want %s", outline(got), err, tc.want)
			}
		})
	}
}

func TestParseStats(t *testing.T) {
	data := teststore.Stats(t)
	got, err := criuimage.ParseStats(data)
	if diff := cmp.Diff(&criuimage.Stats{FreezingTime: 1, FrozenTime: 2, MemdumpTime: 3, MemwriteTime: 4, PagesScanned: 5, PagesWritten: 6}, got); err != nil || diff != "" {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	for n := range data {
		if got, err := criuimage.ParseStats(data[:n]); err == nil {
			t.Errorf("%d bytes of it are %+v", n, got)
		}
	}
}

// FuzzTree: whatever a guest has written, reading it ends.
func FuzzTree(f *testing.F) {
	files := teststore.Images(f, teststore.Processes, "")
	f.Add(files["pstree.img"], files["core-1.img"])
	f.Fuzz(func(_ *testing.T, tree, core []byte) {
		_, _ = criuimage.Tree(func(name string, _ int64) ([]byte, error) {
			if name == "pstree.img" {
				return tree, nil
			}
			return core, nil
		})
	})
}
