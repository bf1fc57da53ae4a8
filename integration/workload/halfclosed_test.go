// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"io"
	"net"
	"strings"
	"testing"
)

// tcpPair is a connection over the loopback interface.
func tcpPair(t *testing.T) (here, there *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp4", anyLoopback)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

func TestHalfClosedNoticesWhatIsWrong(t *testing.T) {
	for name, tc := range map[string]struct {
		// said is what the other end sends before it closes its direction.
		said        string
		sends, last bool
		want        string
	}{
		"a line is lost":             {halfClosedText(1) + halfClosedText(3), false, false, "part 2 is"},
		"the end comes early":        {halfClosedText(1), false, false, "part 2: EOF"},
		"a byte is lost":             {lastWords[:4] + lastWords[5:], false, true, "part 5 is"},
		"the last words are others":  {strings.ToUpper(lastWords), true, false, "the last words of the other end are"},
		"something follows them":     {lastWords + "!", true, true, "the last words of the other end are"},
		"the last words are doubled": {lastWords + lastWords, true, false, "the last words of the other end are"},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := tcpPair(t)
			if _, err := io.WriteString(there, tc.said); err != nil {
				t.Fatal(err)
			}
			if err := there.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := halfClosedEnd(here, tc.sends, tc.last); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, not %q", err, tc.want)
			}
		})
	}
}
