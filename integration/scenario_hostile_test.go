// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// hostileGuest: whoever owns the guest does in a container's exchange directory
// what no agent does. The host opens nothing but regular files, takes no more
// than it allows, and gives the guest no room to write when it needs none. The
// container keeps running, and the next checkpoint is whole.
func hostileGuest(s *scenario) {
	s.configure("max_image_files", 2000)
	s.configure("max_image_bytes", 2<<30)
	pod := s.startPod()
	c := pod.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)
	h := &hostileGuestBed{scenario: s, pod: pod, run: run, dir: "/run/kata-checkpoint/exchange/" + c.ID()}

	h.checkReadOnly()
	s.step("before a checkpoint")

	// While it is made: what is no image, or none of CRIU's.
	for what, words := range map[string][]string{
		"device":    {"core-4711.img", "not a regular file"},
		"fifo":      {"core-4711.img", "not a regular file"},
		"symlink":   {"core-4711.img", "not a regular file"},
		"hard-link": {"not a regular file with a single link"},
		"manifest":  {imageset.ManifestName, "only the host may write"},
	} {
		done := h.start(what)
		s.checkRefused(what, run, s.newDir(), words...)
		h.wait(done)
		h.checkHarmless()
	}
	s.step("files of other kinds")

	// CRIU and the race may both fail, or neither: nothing is opened that is no
	// image (package imageset has a test of that), and nothing is lost.
	done := h.start("race")
	s.Logf("while images and a device change places: %v", s.requestCheckpoint(run, s.newDir()))
	h.wait(done)
	s.step("a race")
	h.checkHarmless()

	// A hole costs the guest nothing, and so it must cost the host.
	const size = 1 << 30
	done = h.start(fmt.Sprintf("hole --n %d", size))
	dir := s.newDir()
	s.check(s.requestCheckpoint(run, dir))
	h.wait(done)
	var st syscall.Stat_t
	s.check(syscall.Stat(filepath.Join(dir, "pages-4711.img"), &st))
	if st.Size != size || st.Blocks != 0 {
		s.Errorf("a hole of %d bytes has become %d bytes in %d blocks", size, st.Size, st.Blocks)
	}
	s.step("a hole")

	// As much as it can, in whatever shape, while a checkpoint takes its time.
	for what, word := range map[string]string{"files --n 3000": "max_image_files", "deep --n 1500": "flat"} {
		h.during(what, func(err error) {
			if err == nil || !strings.Contains(err.Error(), "the guest writes more than it may") || !strings.Contains(err.Error(), word) {
				s.Errorf("%s: the checkpoint ended with: %v", what, err)
			}
		})
		h.checkHarmless()
	}
	s.step("as much as it can")
	s.check(s.requestCheckpoint(run, s.newDir()))
	s.remove(c)

	// It keeps a file open: what it has open it can write to, and nothing else.
	c = pod.create(counter("holding"))
	run = s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)
	h = &hostileGuestBed{scenario: s, pod: pod, run: run, dir: "/run/kata-checkpoint/exchange/" + c.ID()}
	h.checkReadOnly()
	h.during("hold --limit 3m >/dev/null 2>&1 &", s.check)
	exchange := adjust.ExchangeDir(filepath.Join(s.testbed.Dir, "state"), testbed.Namespace, c.ID())
	if !s.eventually(2*time.Minute, func() bool { _, err := os.Stat(exchange); return os.IsNotExist(err) }) {
		s.Error("the exchange directory of a guest that keeps a file open is still there")
	}
	s.checkRefused("a checkpoint of a guest that keeps a file open", run, s.newDir(), "recreate the container")
	s.checkKeepsRunning(run)
}

// hostileGuestBed is a guest, and a container in it.
type hostileGuestBed struct {
	*scenario
	pod *pod
	run *engine.Run
	// dir is the container's exchange directory in the guest.
	dir string
}

// script runs the program hostile, which is in the container's image, as the
// guest's root.
func (h *hostileGuestBed) script(deed string) string {
	return fmt.Sprintf(`for p in /proc/[0-9]*; do case "$(readlink $p/exe)" in */workload) break;; esac; done; $p/exe hostile --dir %s --do %s`, h.dir, deed)
}

// start runs it in the background, until something is to be spoiled.
func (h *hostileGuestBed) start(deed string) <-chan error {
	h.Helper()
	done := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(h.ctx, paced(answerTimeout))
		defer cancel()
		out, status, err := h.testbed.GuestExec(ctx, h.pod.sandbox.ID(), h.script(fmt.Sprintf("%s --limit %s", deed, paced(answerTimeout/2))))
		if err == nil && status != 0 {
			err = fmt.Errorf("%s: status %d: %s", deed, status, out)
		}
		done <- err
	}()
	return done
}

func (h *hostileGuestBed) wait(done <-chan error) {
	h.Helper()
	h.check(<-done)
}

// during runs it while a checkpoint is held up, and calls then with how that
// ends.
func (h *hostileGuestBed) during(deed string, then func(error)) {
	h.Helper()
	const phase = "checkpoint-prepare"
	h.stopAt(phase)
	answer := make(chan error, 1)
	go func() { answer <- h.requestCheckpoint(h.run, h.newDir()) }()
	h.waitStoppedAt(phase, answer)
	h.shellInGuest(h.pod, h.script(deed))
	// One that was ended meanwhile has removed the file itself.
	if err := os.Remove(filepath.Join(h.testbed.StopDir(), phase+".reached")); err != nil && !os.IsNotExist(err) {
		h.Error(err)
	}
	then(<-answer)
	h.step("during a checkpoint: %s", deed)
}

// checkHarmless checks that the container keeps running, that what the guest
// has written is gone, and that it can write no more.
func (h *hostileGuestBed) checkHarmless() {
	h.Helper()
	h.checkKeepsRunning(h.run)
	var left []string
	if !h.eventually(settleTimeout, func() (empty bool) {
		var err error
		left, err = h.testbed.Exchanged("[^.]*")
		h.check(err)
		return len(left) == 0
	}) {
		h.Errorf("in the exchange directory there is %q", left)
	}
	h.checkReadOnly()
}

// checkReadOnly checks that the guest cannot write, by any of the ways that lead
// to its exchange directory.
func (h *hostileGuestBed) checkReadOnly() {
	h.Helper()
	out := h.shellInGuest(h.pod, "mount -o remount,rw "+h.dir+" || true; ("+h.script("write")+")")
	if !strings.Contains(out, workload.HostileLine+" write") {
		h.Errorf("the guest tried to write: %s", out)
	}
}
