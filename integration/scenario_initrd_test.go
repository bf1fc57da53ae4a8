// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
)

// agentInInitrd: guests boot an initrd to which `kata-checkpoint guest-initrd`
// has appended the agent, and nothing is shared with them for it. A container is
// checkpointed and restored in another VM: in a guest whose root is on top of
// the initramfs, in one whose root is the initramfs itself, as with Kata's own
// initrd, and in one that starts the agent itself, without a hook, as an image
// with a service for it does.
func agentInInitrd(s *scenario) {
	o := s.operator()
	kata, err := os.ReadFile(s.testbed.KataConfig())
	s.check(err)
	setting := func(key string) string {
		m := regexp.MustCompile(`(?m)^` + key + ` = "(.*)"$`).FindSubmatch(kata)
		if m == nil {
			s.Fatalf("Kata's configuration has no %s", key)
		}
		return string(m[1])
	}
	made := filepath.Join(s.newDir(), "initrd.img")
	out, err := exec.CommandContext(s.ctx, o.program, "guest-initrd", "--initrd", setting("initrd"), "--bundle", filepath.Join(s.testbed.Dir, "bundle"), "--out", made).CombinedOutput()
	if err != nil {
		s.Fatalf("guest-initrd: %v: %s", err, out)
	}
	hypervisor := regexp.MustCompile(`(?m)^\[(hypervisor\..*)\]$`).FindSubmatch(kata)
	if hypervisor == nil {
		s.Fatal("Kata's configuration has no hypervisor")
	}
	_, lines, ok := strings.Cut(string(out), "[hypervisor.NAME]")
	if !ok {
		s.Fatalf("guest-initrd prints no settings: %s", out)
	}
	dropIn := filepath.Join(filepath.Dir(s.testbed.KataConfig()), "config.d/60-initrd.toml")
	s.check(os.MkdirAll(filepath.Dir(dropIn), 0o755))
	s.afterContainers(func() error { return os.RemoveAll(filepath.Dir(dropIn)) })
	for name, param := range map[string]string{"overlay": "testbed.root=overlay", "initramfs": "testbed.root=initramfs", "service": "testbed.agent=service"} {
		text := "[" + string(hypervisor[1]) + "]" + lines + "kernel_params = \"" + setting("kernel_params") + " " + param + "\"\n[runtime]\nsandbox_bind_mounts = []\n"
		if name == "service" {
			text = strings.ReplaceAll(text, guestinitrd.HookPath, "")
		}
		s.check(os.WriteFile(dropIn, []byte(text), 0o644))
		findings, _ := s.checkCommand()
		if i := slices.IndexFunc(findings, func(f finding) bool { return f.Check == "kata.initrd" }); name != "service" && (i < 0 || findings[i].Level != "ok") {
			s.Errorf("check says %+v", findings)
		}
		c := s.create(counter(name))
		first := s.run(c)
		s.waitNumbers(first.Output, workload.Ticks, 3)
		dir := s.checkpoint(first, true)
		s.waitExit(first, 137)
		ticks := s.printedNumbers(first.Output, workload.Ticks)
		restored := s.restore(c, dir)
		s.checkConsecutive(1, append(ticks, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
		s.checkOtherVM(first, restored)
		s.checkExecIn(c)
		s.remove(c)
		s.step("tried: %s", name)
	}
}
