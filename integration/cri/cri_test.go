// SPDX-License-Identifier: Apache-2.0

package cri

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseLog(t *testing.T) {
	const log = "2026-01-02T03:04:05.6Z stdout F one\n" +
		"2026-01-02T03:04:05.6Z stderr F not this\n" +
		"2026-01-02T03:04:05.6Z stdout P two, \n" +
		"2026-01-02T03:04:05.6Z stdout F in parts\n" +
		"2026-01-02T03:04:05.6Z stdout F \n" +
		"2026-01-02T03:04:05.6Z stdout F cut of"
	got, err := ParseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"one", "two, in parts", ""}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if _, err := ParseLog("garbage\n"); err == nil {
		t.Error("garbage is taken for a log")
	}
}
