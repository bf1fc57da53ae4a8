// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"os/signal"
	"strconv"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// beClient has three requests in flight, all on one connection, until SIGTERM.
func beClient(ctx context.Context) error {
	stopped, cancel := signal.NotifyContext(ctx, unix.SIGTERM)
	defer cancel()
	client, err := newClient()
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(stopped)
	for _, part := range []func(context.Context, *http.Client) error{appendEntries, followTicks, waitForSignals} {
		group.Go(func() error { return part(ctx, client) })
	}
	if err := group.Wait(); err != nil && stopped.Err() == nil {
		return err
	}
	return nil
}

// appendEntries appends entry after entry, and prints "round N" for each once
// the server has all of them.
func appendEntries(ctx context.Context, client *http.Client) error {
	var want chain
	for n := 1; ; n++ {
		entry := fmt.Sprintf("this is entry %d", n)
		want.add(entry)
		have, err := askText(ctx, client, "/append", entry)
		if err != nil {
			return err
		}
		if have != want.String() {
			return fmt.Errorf("the server has the entries %s, not %s", have, &want)
		}
		fmt.Println("round", n)
	}
}

// followTicks reads an answer that does not end.
func followTicks(ctx context.Context, client *http.Client) error {
	answer, err := ask(ctx, client, "/ticks", "")
	if err != nil {
		return err
	}
	defer answer.Close()
	lines := bufio.NewScanner(answer)
	for n := 1; lines.Scan(); n++ {
		if have := lines.Text(); have != strconv.Itoa(n) {
			return fmt.Errorf("tick %d is %q", n, have)
		}
	}
	return fmt.Errorf("the ticks have ended: %w", cmp.Or(lines.Err(), io.ErrUnexpectedEOF))
}

// waitForSignals prints what the server answers whenever it does.
func waitForSignals(ctx context.Context, client *http.Client) error {
	for {
		text, err := askText(ctx, client, "/wait", "")
		if err != nil {
			return err
		}
		fmt.Println("signal", text)
	}
}
