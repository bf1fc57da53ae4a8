// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// following is a follower, the directory that the guest writes to and the one
// that the copies go to.
type following struct {
	*Follower
	from, to string
}

func follow(t *testing.T, limits Limits, skip ...string) *following {
	t.Helper()
	f := &following{from: filepath.Join(t.TempDir(), "images"), to: t.TempDir()}
	dst, err := os.Open(f.to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dst.Close() })
	if canClone(f.to, dst) {
		t.Skip("files can share their blocks here: none is copied early")
	}
	f.Follower = Follow(filepath.Dir(f.from), "images", dst, limits, skip...)
	t.Cleanup(f.Stop)
	if err := os.Mkdir(f.from, 0o700); err != nil {
		t.Fatal(err)
	}
	return f
}

// append is what the guest does.
func (f *following) append(t *testing.T, name, what string) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(f.from, name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteString(what); err != nil {
		t.Fatal(err)
	}
}

// copied waits until so much of a file is there.
func (f *following) copied(t *testing.T, name string, size int) {
	t.Helper()
	limit := time.After(2 * time.Minute)
	for {
		st, err := os.Stat(filepath.Join(f.to, name))
		if err == nil && st.Size() == int64(size) {
			return
		}
		select {
		case <-time.After(time.Millisecond):
		case <-limit:
			t.Fatalf("%s has not been copied up to %d bytes", name, size)
		}
	}
}

// want collects, and expects files with this content and no others.
func (f *following) want(t *testing.T, content map[string]string) {
	t.Helper()
	files, err := f.Collect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(content) || len(names(t, f.to)) != len(content) {
		t.Errorf("got %v in %q, want %d files", files, names(t, f.to), len(content))
	}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(f.to, file.Name))
		if err != nil {
			t.Fatal(err)
		}
		if string(data) != content[file.Name] {
			t.Errorf("%s: %d bytes that are not those of the %d", file.Name, len(data), len(content[file.Name]))
		}
		if want := (File{Name: file.Name, Size: int64(len(data)), BLAKE3: digest(string(data))}); file != want {
			t.Errorf("got %v, want %v", file, want)
		}
	}
}

var roomy = Limits{Files: 100, Bytes: 1 << 30}

func TestFollowGrowingFiles(t *testing.T) {
	f := follow(t, roomy, DumpLogName)
	one, two := strings.Repeat("1", followFrom), strings.Repeat("two", followFrom)
	f.append(t, DumpLogName, one)
	f.append(t, "pages-1.img", one)
	f.copied(t, "pages-1.img", len(one))
	f.append(t, "pages-1.img", two)
	f.append(t, "pages-2.img", two)
	f.copied(t, "pages-1.img", len(one+two))
	f.copied(t, "pages-2.img", len(two))
	f.append(t, "pages-2.img", one) // perhaps never seen before the end
	f.append(t, "pages-3.img", two)
	f.append(t, "inventory.img", "small")
	f.want(t, map[string]string{"pages-1.img": one + two, "pages-2.img": two + one, "pages-3.img": two, "inventory.img": "small"})
}

// A guest that does more than append costs time, and nothing else.
func TestFollowFilesThatChange(t *testing.T) {
	before := strings.Repeat("a", 3*followFrom)
	for name, tc := range map[string]struct {
		change func(t *testing.T, path string)
		want   map[string]string
	}{
		"written over": {
			change: func(t *testing.T, path string) {
				file, err := os.OpenFile(path, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer file.Close()
				if _, err := file.WriteAt([]byte("b"), followFrom); err != nil {
					t.Fatal(err)
				}
			},
			want: map[string]string{"pages-1.img": before[:followFrom] + "b" + before[followFrom+1:]},
		},
		"cut": {
			change: func(t *testing.T, path string) {
				if err := os.Truncate(path, followFrom+1); err != nil {
					t.Fatal(err)
				}
			},
			want: map[string]string{"pages-1.img": before[:followFrom+1]},
		},
		"another of the same name": {
			change: func(t *testing.T, path string) {
				write(t, path+".new", strings.ReplaceAll(before, "a", "c"))
				if err := os.Rename(path+".new", path); err != nil {
					t.Fatal(err)
				}
			},
			want: map[string]string{"pages-1.img": strings.ReplaceAll(before, "a", "c")},
		},
		"removed": {
			change: func(t *testing.T, path string) {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			},
			want: map[string]string{},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := follow(t, roomy)
			f.append(t, "pages-1.img", before)
			f.copied(t, "pages-1.img", len(before))
			tc.change(t, filepath.Join(f.from, "pages-1.img"))
			f.want(t, tc.want)
		})
	}
}

func TestFollowManyFiles(t *testing.T) {
	f := follow(t, roomy)
	want := map[string]string{}
	for i := range maxFollowed + 3 {
		name := fmt.Sprintf("pages-%03d.img", i)
		want[name] = strings.Repeat(string('a'+rune(i%26)), followFrom+i)
		f.append(t, name, want[name])
	}
	f.copied(t, fmt.Sprintf("pages-%03d.img", maxFollowed/2), followFrom+maxFollowed/2)
	f.want(t, want)
}

// A hole that grows needs no blocks, and a copy of it that is found in the end
// to differ is made again.
func TestFollowHoles(t *testing.T) {
	f := follow(t, roomy)
	const size = 64 << 20
	vast(t, filepath.Join(f.from, "pages-1.img"), size)
	f.append(t, "pages-2.img", strings.Repeat("\x00", 2*followFrom)+"end")
	f.copied(t, "pages-2.img", 2*followFrom+3)
	if err := os.Truncate(filepath.Join(f.from, "pages-1.img"), size+followFrom); err != nil {
		t.Fatal(err)
	}
	files, err := f.Collect(t.Context())
	if err != nil || len(files) != 2 || files[0].Size != size+followFrom {
		t.Fatalf("%v, %v", files, err)
	}
	wantVast(t, filepath.Join(f.to, "pages-1.img"), size+followFrom)
}

// What is refused in the end takes no room before.
func TestFollowRefuses(t *testing.T) {
	f := follow(t, Limits{Files: 100, Bytes: 2 * followFrom})
	f.append(t, "pages-1.img", strings.Repeat("a", followFrom))
	f.copied(t, "pages-1.img", followFrom)
	f.append(t, "pages-1.img", strings.Repeat("a", 2*followFrom))
	<-f.ended
	if got := names(t, f.to); len(got) > 0 {
		t.Errorf("there is %q", got)
	}
	_, err := f.Collect(t.Context())
	wantError(t, err, "max_image_bytes")
}

func TestFollowStops(t *testing.T) {
	f := follow(t, roomy)
	f.append(t, "pages-1.img", strings.Repeat("a", followFrom))
	f.copied(t, "pages-1.img", followFrom)
	f.Stop()
	f.append(t, "pages-1.img", "b")
	f.Stop()
	st, err := os.Stat(filepath.Join(f.to, "pages-1.img"))
	if err != nil || st.Size() != followFrom {
		t.Errorf("%v, %v", st, err)
	}
}

// A container of many processes has many small files, which are not opened each
// time that the follower looks for more data.
func TestASmallFileIsNotOpenedBeforeItIsCollected(t *testing.T) {
	f := follow(t, Limits{Files: 10, Bytes: 1 << 30})
	f.append(t, "small.img", "small")
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, filepath.Join(f.from, "small.img"), unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("l", followFrom)
	for i := range 3 { // each is seen in another pass
		f.append(t, "large.img", large)
		f.copied(t, "large.img", (i+1)*followFrom)
	}
	if n, err := unix.Read(watch, make([]byte, 4096)); err == nil {
		t.Errorf("it was opened: %d bytes of events", n)
	}
	f.want(t, map[string]string{"small.img": "small", "large.img": strings.Repeat(large, 3)})
}
