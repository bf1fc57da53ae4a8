// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"testing"
)

func TestRelayAnswersAndAsks(t *testing.T) {
	r := &relay{address: "127.0.0.1:0"}
	if err := r.listen(); err != nil {
		t.Fatal(err)
	}
	other := relay{address: "127.0.0.1:0"}
	if err := other.listen(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ question, want string }{
		{"say one two", "1 one two"},
		{fmt.Sprintf("ask %s say three", other.address), "2 1 three"},
		{"sing", `3 error: unknown request "sing"`},
	} {
		if got, err := Ask(r.address, tc.question); err != nil || got != tc.want {
			t.Errorf("%q: %q, %v, want %q", tc.question, got, err, tc.want)
		}
	}
	rounds(t, r, 1)
}
