// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A dependency that reaches a shipped binary has to reach NOTICE, too.
func TestNoticeListsTheLinkedModules(t *testing.T) {
	root := filepath.Join("..", "..", "..")
	want, err := moduleList(root)
	if err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(filepath.Join(root, noticeFile))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(written), "\n\n"+want+"\n") {
		t.Errorf("NOTICE is not what `make notice` would write; the modules are now\n%s", want)
	}
}

func TestIdentify(t *testing.T) {
	for text, want := range map[string]string{
		"                Apache License\n          Version 2.0, January 2004": "Apache-2.0",
		"Permission is hereby granted,\nfree of charge, to any person":        "MIT",
		"Creative Commons Legal Code\n\nCC0 1.0 Universal":                    "CC0-1.0",
		"Redistributions in binary form\n must reproduce the above":           "BSD-2-Clause",
		"Redistributions in binary form must reproduce … Neither the name":    "BSD-3-Clause",
		"All rights reserved.": "",
	} {
		if got := identify(text); got != want {
			t.Errorf("identify(%q) = %q, want %q", text, got, want)
		}
	}
}
