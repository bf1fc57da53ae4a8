// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"
)

// The values are the test vectors of BLAKE3's authors, whose input counts from 0
// to 250 again and again.
func TestDigestIsBLAKE3(t *testing.T) {
	for size, want := range map[int]string{
		0:    "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
		1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
	} {
		content := make([]byte, size)
		for i := range content {
			content[i] = byte(i % 251)
		}
		file, err := Describe(t.Context(), "x", strings.NewReader(string(content)))
		if err != nil || file != (File{Name: "x", Size: int64(size), BLAKE3: want}) {
			t.Errorf("%d bytes: %+v, %v", size, file, err)
		}
	}
}

// Image sets of earlier releases, and what others have written for them, have
// SHA-256.
func TestSHA256IsRead(t *testing.T) {
	sum := sha256.Sum256([]byte("content"))
	earlier := hex.EncodeToString(sum[:])
	for name, tc := range map[string]struct {
		file    File
		content string
		same    bool
	}{
		"of an earlier release":                    {File{Size: 7, SHA256: earlier}, "content", true},
		"of an earlier release, another content":   {File{Size: 7, SHA256: earlier}, "Content", false},
		"of an earlier release, more content":      {File{Size: 7, SHA256: earlier}, "content.", false},
		"of this one":                              {File{Size: 7, BLAKE3: digest("content")}, "content", true},
		"of this one, another content":             {File{Size: 7, BLAKE3: digest("content")}, "Content", false},
		"SHA-256 in place of BLAKE3":               {File{Size: 7, BLAKE3: earlier}, "content", false},
		"BLAKE3 in place of SHA-256":               {File{Size: 7, SHA256: digest("content")}, "content", false},
		"both, and SHA-256 is of the content":      {File{Size: 7, SHA256: earlier, BLAKE3: digest("x")}, "content", true},
		"both, and SHA-256 is of another content":  {File{Size: 7, SHA256: earlier, BLAKE3: digest("Content")}, "Content", false},
		"neither, which a manifest may not have":   {File{Size: 7}, "content", false},
		"neither, and nothing (an empty checksum)": {File{}, "", false},
	} {
		same, err := tc.file.Matches(t.Context(), strings.NewReader(tc.content))
		if err != nil || same != tc.same {
			t.Errorf("%s: %v, %v", name, same, err)
		}
		if valid := tc.file.SHA256+tc.file.BLAKE3 != ""; tc.file.digestsAreValid() != valid {
			t.Errorf("%s: valid: %v", name, !valid)
		}
	}
}
