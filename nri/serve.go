// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

const (
	// registrationTimeout bounds the time from connecting to containerd until it
	// configures the plugin. Its own limit is 5 s.
	registrationTimeout = 15 * time.Second
	// firstDelay suits a containerd that restarts, lastDelay one that stays down.
	firstDelay = 500 * time.Millisecond
	lastDelay  = 15 * time.Second
)

var (
	// errStuck is returned for a connection that cannot be abandoned: the stub
	// waits for its configuration indefinitely while it holds its lock.
	errStuck = errors.New("containerd has accepted the connection, but has not configured the plugin")
	// errSetup is returned where another attempt is pointless.
	errSetup = errors.New("set up NRI plugin")
)

// Options are those of the registration with NRI. For empty fields, NRI's
// defaults apply: index and name are those of the executable, NN-NAME, or those
// in the environment in which containerd has started it.
type Options struct {
	Index  string
	Name   string
	Socket string
}

// Serve answers requests until ctx ends, then returns nil. When the connection
// to containerd is lost, it reconnects, however long that takes, unless
// containerd has started this process: then it will start another one.
func (p *Plugin) Serve(ctx context.Context, o Options) error {
	if os.Getenv(api.PluginSocketEnvVar) != "" {
		configured, err := p.session(ctx, o)
		if configured && err != nil {
			log.G(ctx).WithError(err).Info("containerd, which has started the plugin, has disconnected")
			err = nil
		}
		return err
	}
	for delay := firstDelay; ; delay = min(2*delay, lastDelay) {
		configured, err := p.session(ctx, o)
		if err == nil || errors.Is(err, errStuck) || errors.Is(err, errSetup) {
			return err
		}
		if configured {
			delay = firstDelay
		}
		log.G(ctx).WithError(err).WithField("delay", delay).Warn("failed to connect to NRI, retrying")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// session is one connection, until it is closed. The end of ctx is not an
// error.
func (p *Plugin) session(ctx context.Context, o Options) (configured bool, err error) {
	c := &connection{Plugin: p, configured: make(chan struct{}, 1)}
	if o.Index != "" {
		if err := api.CheckPluginIndex(o.Index); err != nil {
			return false, fmt.Errorf("%w: %w", errSetup, err)
		}
	}
	// A stub that failed to register keeps its connection: each has one of its
	// own.
	s, err := stub.New(c, o.stub()...)
	if err != nil {
		return false, fmt.Errorf("%w: %w: name the executable NN-NAME, or set --idx", errSetup, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()

	// A signal ends the wait as well: the stub ignores ctx until it is configured.
	select {
	case err = <-ended:
		return false, fmt.Errorf("connect to NRI: %w", err)
	case <-ctx.Done():
		return false, nil
	case <-time.After(registrationTimeout):
		return false, fmt.Errorf("connect to NRI: %w within %s", errStuck, registrationTimeout)
	case <-c.configured:
	}
	if err = <-ended; ctx.Err() != nil {
		err = nil
	} else {
		err = fmt.Errorf("connection to NRI: %w", cmp.Or(err, io.EOF))
	}
	return true, err
}

func (o Options) stub() []stub.Option {
	opts := []stub.Option{stub.WithLogger(logger{})}
	if o.Index != "" {
		opts = append(opts, stub.WithPluginIdx(o.Index))
	}
	if o.Name != "" {
		opts = append(opts, stub.WithPluginName(o.Name))
	}
	if o.Socket != "" {
		opts = append(opts, stub.WithSocketPath(o.Socket))
	}
	return opts
}

// connection is the plugin for one connection.
type connection struct {
	*Plugin
	configured chan struct{}
}

// Configure completes the registration.
func (c *connection) Configure(ctx context.Context, config, runtime, version string) (api.EventMask, error) {
	entry := log.G(ctx).WithFields(log.Fields{"runtime": runtime, "version": version, "handlers": c.handlers, "stateDir": c.stateDir})
	if config != "" {
		entry.Warn("ignoring the configuration that NRI has for the plugin: config.toml is used")
	}
	entry.Info("registered with NRI")
	select {
	case c.configured <- struct{}{}:
	default:
	}
	// Subscribe to all events that this type has a method for.
	return 0, nil
}

// logger logs for the stub, whose steps are details here.
type logger struct{}

func (logger) Debugf(ctx context.Context, format string, args ...any) {
	log.G(ctx).Debugf("nri: "+format, args...)
}

func (logger) Infof(ctx context.Context, format string, args ...any) {
	log.G(ctx).Debugf("nri: "+format, args...)
}

func (logger) Warnf(ctx context.Context, format string, args ...any) {
	log.G(ctx).Warnf("nri: "+format, args...)
}

func (logger) Errorf(ctx context.Context, format string, args ...any) {
	log.G(ctx).Errorf("nri: "+format, args...)
}
