// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"os"
	"strings"
	"time"
)

// agentLog is where the guest agent's log and, below it, those of CRIU's runs
// are in a guest.
const agentLog = "tail -n 40 /run/kata-checkpoint/agent.log"

// attachLogs writes the ends of all logs that may say why a scenario failed to
// the test's.
func (s *scenario) attachLogs() {
	if data, err := os.ReadFile(s.testbed.ContainerdLog()); err == nil {
		if int64(len(data)) > s.logStart {
			data = data[s.logStart:]
		}
		s.attach("containerd and shims", tail(string(data), 60, func(line string) bool {
			// At level info, Kata's shims tell all that they do.
			detail := strings.Contains(line, "level=info") && strings.Contains(line, "name=containerd-shim-v2")
			return !detail && !strings.Contains(line, "level=debug") && !strings.Contains(line, "level=trace")
		}))
	}
	for _, id := range s.ids {
		if data, err := os.ReadFile(s.testbed.ConsoleLog(id)); err == nil {
			s.attach("console of "+id, tail(string(data), 30, func(line string) bool {
				// Kata's agent tells all that it does, in lines of JSON.
				return !strings.Contains(line, `"level":"INFO"`) && !strings.Contains(line, `"level":"DEBG"`)
			}))
		}
		ctx, cancel := context.WithTimeout(context.Background(), paced(5*time.Second))
		if out, _, err := s.testbed.GuestExec(ctx, id, agentLog); err == nil {
			s.attach("guest agent of "+id, string(out))
		}
		cancel()
	}
}

func (s *scenario) attach(name, text string) {
	if text != "" {
		s.Logf("---- %s ----\n%s", name, text)
	}
}

// tail gives the last lines of a log that are worth it.
func tail(text string, n int, worth func(line string) bool) string {
	var lines []string
	for line := range strings.Lines(text) {
		if worth(line) {
			const longest = 400
			if len(line) > longest {
				line = line[:longest] + " …\n"
			}
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// hasLogged reports whether a text was logged since the scenario began.
func (s *scenario) hasLogged(text string) bool {
	s.Helper()
	data, err := os.ReadFile(s.testbed.ContainerdLog())
	s.check(err)
	return bytes.Contains(data[s.logStart:], []byte(text))
}
