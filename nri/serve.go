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
	// registrationTimeout is how long containerd may take from the connection
	// to the plugin's configuration. Its own limit is 5 s.
	registrationTimeout = 15 * time.Second
	// firstDelay is short, for a containerd that restarts; lastDelay is for one
	// that stays away.
	firstDelay = 500 * time.Millisecond
	lastDelay  = 15 * time.Second
)

var (
	// errStuck means a connection that cannot be given up: the stub waits for its
	// configuration, without a limit, while it holds its lock.
	errStuck = errors.New("containerd has taken the connection, but has not configured the plugin")
	// errSetup means what another attempt does not mend.
	errSetup = errors.New("set up NRI plugin")
)

// Options say how the plugin makes itself known. Empty fields are left to
// NRI's defaults: index and name are those of the executable, NN-NAME, or of
// the environment in which containerd has started it.
type Options struct {
	Index  string
	Name   string
	Socket string
}

// Serve answers requests until ctx ends, then returns nil. When containerd
// goes away, it connects again for as long as it takes, unless containerd has
// started this process: then it will start another one.
func (p *Plugin) Serve(ctx context.Context, o Options) error {
	if os.Getenv(api.PluginSocketEnvVar) != "" {
		configured, err := p.session(ctx, o)
		if configured && err != nil {
			log.G(ctx).WithError(err).Info("containerd, which has started the plugin, needs it no longer")
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
		log.G(ctx).WithError(err).WithField("delay", delay).Warn("not connected to NRI, trying again")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// session is one connection, from its beginning to its end. That ctx ends is
// no error.
func (p *Plugin) session(ctx context.Context, o Options) (configured bool, err error) {
	c := &connection{Plugin: p, configured: make(chan struct{}, 1)}
	if o.Index != "" {
		if err := api.CheckPluginIndex(o.Index); err != nil {
			return false, fmt.Errorf("%w: %w", errSetup, err)
		}
	}
	// A stub that failed to register keeps its connection: each has one of its own.
	s, err := stub.New(c, o.stub()...)
	if err != nil {
		return false, fmt.Errorf("%w: %w: name the executable NN-NAME, or say its index", errSetup, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()

	// A signal ends the wait, too: the stub does not hear of it before it is configured.
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

// Configure is the end of a registration.
func (c *connection) Configure(ctx context.Context, config, runtime, version string) (api.EventMask, error) {
	entry := log.G(ctx).WithFields(log.Fields{"runtime": runtime, "version": version, "handlers": c.handlers, "stateDir": c.stateDir})
	if config != "" {
		entry.Warn("the configuration that NRI has for the plugin is not used: config.toml is")
	}
	entry.Info("registered with NRI")
	select {
	case c.configured <- struct{}{}:
	default:
	}
	// All events that there is a method for.
	return 0, nil
}

// logger passes on what the stub logs. Its steps are details here.
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
