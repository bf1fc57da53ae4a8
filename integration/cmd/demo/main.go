// demo shows to somebody who has never seen it how a container goes on in another VM. `make demo` builds what it needs and runs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/screen"
)

func main() {
	kata := flag.String("kata", "", "`directory` with a real Kata in place of the stand-in")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// The steps say what happens; what the libraries log would only stand between them.
	_ = log.SetLevel("error")
	s := &show{Screen: screen.New(os.Stdout), kata: *kata}
	if err := s.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
