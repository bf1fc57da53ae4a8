// SPDX-License-Identifier: Apache-2.0

// Package config is the operator's configuration of the host side: one TOML
// file that the shim and the NRI plugin read, each once when it starts. Every
// key has a default that works, and the file may be missing.
package config

import (
	"cmp"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

const (
	// DefaultPath is where the file is looked for.
	DefaultPath = "/etc/kata-checkpoint/config.toml"
	// PathEnv is the environment variable that names another file.
	PathEnv = "KATA_CHECKPOINT_CONFIG"
)

// trustedKeysName is a directory below state_dir, see [Config.TrustedKeysDir].
const trustedKeysName = "trusted-keys"

// signingKeyName is below state_dir, unless signing_key names another file.
const signingKeyName = "signing-key.pem"

// Values of guest_agent.
const (
	AgentRequired = "required"
	AgentOptional = "optional"
)

// Values of load_criu.
const (
	LoadAtFirstUse = "at-first-use"
	LoadAtStart    = "at-start"
)

// Config is the content of the file, checked and with defaults filled in.
// configs/config.toml documents the keys.
type Config struct {
	DownstreamShim    string
	KataConfigPath    string
	StateDir          string
	GuestBundle       string
	AgentOptional     bool
	AgentPort         uint32
	AgentTimeout      time.Duration
	FreezeTimeout     time.Duration
	CheckpointTimeout time.Duration
	ExecWaitTimeout   time.Duration
	AfterCheckpoint   string
	// AfterCheckpointCRI is for containers that the CRI created.
	AfterCheckpointCRI string
	// Thaw is for containers that the CRI has not created.
	Thaw string
	// PreDumps is how often the memory of a container is copied at most before a
	// checkpoint freezes it.
	PreDumps int
	// PreDumpsCRI is for containers that the CRI created.
	PreDumpsCRI int
	// LoadCRIUAtStart: a guest loads CRIU once a container has started, and not
	// before the first checkpoint.
	LoadCRIUAtStart bool
	MaxImageFiles   int
	MaxImageBytes   int64
	// ReserveBytes stay free on a file system that images are written to.
	ReserveBytes int64
	// RestoreDir is the directory of the archives that pods may name.
	RestoreDir string
	// SigningKey is the file with the node's own key.
	SigningKey string
	// TrustedKeys are those of other nodes: in the file, and in TrustedKeysDir.
	TrustedKeys []ed25519.PublicKey
	// RestoreUnsigned allows the CRI to restore what no trusted key has signed.
	RestoreUnsigned bool
	// RequireSignature forbids other engines to do so.
	RequireSignature bool
	// NRIRuntimeHandlers are the CRI's names for our runtime; "" is its default.
	NRIRuntimeHandlers []string
	// MetricsAddress is where kata-checkpoint-nri serves /metrics; empty: nowhere.
	MetricsAddress string
	// TracesEndpoint is the URL of a collector to which kata-checkpoint-nri
	// exports spans by OTLP over HTTP; empty: that of its environment.
	TracesEndpoint string
	// MetricsDir is the spool, see package metrics.
	MetricsDir string
	// BundleInUse is the directory that GuestBundle, a symbolic link, led to when
	// the file was read; empty if it is none.
	BundleInUse string
}

// Agent is the agent's binary in the guest bundle. Where guest_bundle is a
// symbolic link, as `kata-checkpoint install` makes it, that is the bundle
// which it led to when the configuration was read: a sandbox keeps the release
// with which it was started.
func (c *Config) Agent() string {
	return filepath.Join(cmp.Or(c.BundleInUse, c.GuestBundle), api.AgentBinary)
}

// TrustedKeysDir has files with public keys of other nodes, beside those in the
// configuration's own file: `kata-checkpoint trust` writes them.
func (c *Config) TrustedKeysDir() string { return filepath.Join(c.StateDir, trustedKeysName) }

// file has the keys as written.
type file struct {
	DownstreamShim     string   `toml:"downstream_shim"`
	KataConfigPath     string   `toml:"kata_config_path"`
	StateDir           string   `toml:"state_dir"`
	GuestBundle        string   `toml:"guest_bundle"`
	GuestAgent         string   `toml:"guest_agent"`
	AgentPort          int64    `toml:"agent_port"`
	AgentTimeout       string   `toml:"agent_timeout"`
	FreezeTimeout      string   `toml:"freeze_timeout"`
	CheckpointTimeout  string   `toml:"checkpoint_timeout"`
	ExecWaitTimeout    string   `toml:"exec_wait_timeout"`
	AfterCheckpoint    string   `toml:"after_checkpoint"`
	AfterCheckpointCRI string   `toml:"after_checkpoint_cri"`
	Thaw               string   `toml:"thaw"`
	PreDump            string   `toml:"pre_dump"`
	PreDumpCRI         string   `toml:"pre_dump_cri"`
	LoadCRIU           string   `toml:"load_criu"`
	MaxImageFiles      int64    `toml:"max_image_files"`
	MaxImageBytes      int64    `toml:"max_image_bytes"`
	ReserveBytes       int64    `toml:"reserve_bytes"`
	RestoreDir         string   `toml:"restore_dir"`
	SigningKey         string   `toml:"signing_key"`
	TrustedKeys        []string `toml:"trusted_keys"`
	RestoreUnsigned    bool     `toml:"restore_unsigned"`
	RequireSignature   bool     `toml:"require_signature"`
	NRIRuntimeHandlers []string `toml:"nri_runtime_handlers"`
	MetricsAddress     string   `toml:"metrics_address"`
	TracesEndpoint     string   `toml:"traces_endpoint"`
	MetricsDir         string   `toml:"metrics_dir"`
}

func defaults() file {
	return file{
		DownstreamShim:     "containerd-shim-kata-v2",
		StateDir:           "/var/lib/kata-checkpoint",
		GuestBundle:        "/opt/kata-checkpoint/guest",
		GuestAgent:         AgentRequired,
		AgentPort:          api.DefaultPort,
		AgentTimeout:       "10s",
		FreezeTimeout:      "10s",
		CheckpointTimeout:  "10m",
		ExecWaitTimeout:    "30s",
		AfterCheckpoint:    annotations.Stop,
		AfterCheckpointCRI: annotations.LeaveRunning,
		Thaw:               annotations.AtResume,
		PreDump:            annotations.PreDumpOff,
		PreDumpCRI:         annotations.PreDumpOff,
		LoadCRIU:           LoadAtFirstUse,
		MaxImageFiles:      65536,
		MaxImageBytes:      256 << 30,
		ReserveBytes:       1 << 30,
		RestoreDir:         "/var/lib/kubelet/checkpoints",
		NRIRuntimeHandlers: []string{"kata-checkpoint"},
		MetricsDir:         "/run/kata-checkpoint/metrics",
	}
}

// Path returns the file that Load reads unless the caller has another.
func Path() string {
	if p := os.Getenv(PathEnv); p != "" {
		return p
	}
	return DefaultPath
}

// Load reads the file at path. It returns the defaults for a file that does not
// exist, unless the environment names it.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && os.Getenv(PathEnv) == "" {
		data, err = nil, nil
	}
	if err != nil {
		return nil, errcode.Config.Errorf("read configuration: %w", err)
	}
	c, err := parse(data)
	if err != nil {
		return nil, errcode.Config.Errorf("configuration %s: %w", path, err)
	}
	keys, err := signing.ReadDir(c.TrustedKeysDir())
	if err != nil {
		return nil, errcode.TrustedKey.Errorf("keys that this node trusts: %w", err)
	}
	for _, k := range keys {
		c.TrustedKeys = append(c.TrustedKeys, k.Key)
	}
	if dir, err := filepath.EvalSymlinks(c.GuestBundle); err == nil && dir != c.GuestBundle {
		c.BundleInUse = dir
	}
	return c, nil
}

func parse(data []byte) (*Config, error) {
	f := defaults()
	d := toml.NewDecoder(strings.NewReader(string(data)))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, explain(err)
	}
	c := &Config{
		DownstreamShim:     f.DownstreamShim,
		KataConfigPath:     f.KataConfigPath,
		StateDir:           f.StateDir,
		GuestBundle:        f.GuestBundle,
		AgentOptional:      f.GuestAgent == AgentOptional,
		AfterCheckpoint:    f.AfterCheckpoint,
		AfterCheckpointCRI: f.AfterCheckpointCRI,
		Thaw:               f.Thaw,
		MaxImageBytes:      f.MaxImageBytes,
		ReserveBytes:       f.ReserveBytes,
		RestoreDir:         f.RestoreDir,
		SigningKey:         f.SigningKey,
		RestoreUnsigned:    f.RestoreUnsigned,
		RequireSignature:   f.RequireSignature,
		NRIRuntimeHandlers: f.NRIRuntimeHandlers,
		MetricsAddress:     f.MetricsAddress,
		TracesEndpoint:     f.TracesEndpoint,
		MetricsDir:         f.MetricsDir,
	}
	var errs []error
	check := func(key string, ok bool, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s must be %s", key, want))
		}
	}
	check("downstream_shim", f.DownstreamShim != "" && (filepath.IsAbs(f.DownstreamShim) || !strings.Contains(f.DownstreamShim, "/")),
		"an absolute path, or a name on PATH")
	check("kata_config_path", f.KataConfigPath == "" || filepath.IsAbs(f.KataConfigPath), "empty or an absolute path")
	check("state_dir", filepath.IsAbs(f.StateDir), "an absolute path")
	check("guest_bundle", filepath.IsAbs(f.GuestBundle), "an absolute path")
	check("guest_agent", f.GuestAgent == AgentRequired || f.GuestAgent == AgentOptional, `"required" or "optional"`)
	check("agent_port", f.AgentPort > 0 && f.AgentPort < 1<<32-1, "a vsock port, 1 to 4294967294")
	for _, a := range []struct{ key, value string }{{"after_checkpoint", f.AfterCheckpoint}, {"after_checkpoint_cri", f.AfterCheckpointCRI}} {
		check(a.key, a.value == annotations.Stop || a.value == annotations.LeaveRunning, `"stop" or "leave-running"`)
	}
	check("thaw", f.Thaw == annotations.AfterDump || f.Thaw == annotations.AtResume, `"after-dump" or "at-resume"`)
	for _, p := range []struct {
		key, value string
		to         *int
	}{{"pre_dump", f.PreDump, &c.PreDumps}, {"pre_dump_cri", f.PreDumpCRI, &c.PreDumpsCRI}} {
		n, err := annotations.PreDumps(p.value)
		check(p.key, err == nil, fmt.Sprintf(`"off", "auto" or a number from "1" to "%d"`, annotations.MaxPreDumps))
		*p.to = n
	}
	check("load_criu", f.LoadCRIU == LoadAtFirstUse || f.LoadCRIU == LoadAtStart, `"at-first-use" or "at-start"`)
	c.LoadCRIUAtStart = f.LoadCRIU == LoadAtStart
	// A set has one file at least, CRIU's inventory; a million is a mistake.
	check("max_image_files", f.MaxImageFiles > 0 && f.MaxImageFiles <= 1<<20, "between 1 and 1048576")
	check("max_image_bytes", f.MaxImageBytes > 0, "greater than 0")
	check("reserve_bytes", f.ReserveBytes >= 0, "0 or more")
	check("restore_dir", filepath.IsAbs(f.RestoreDir), "an absolute path")
	check("signing_key", f.SigningKey == "" || filepath.IsAbs(f.SigningKey), "empty or an absolute path")
	for i, text := range f.TrustedKeys {
		keys, err := signing.ParsePublic(text)
		check("trusted_keys", err == nil, fmt.Sprintf("a list of Ed25519 public keys in PEM, and entry %d has %v", i+1, err))
		c.TrustedKeys = append(c.TrustedKeys, keys...)
	}
	check("nri_runtime_handlers", len(f.NRIRuntimeHandlers) > 0, "a list of one or more runtime handlers")
	check("metrics_address", validAddress(f.MetricsAddress), `empty, "HOST:PORT", or "unix:" and an absolute path`)
	check("traces_endpoint", validURL(f.TracesEndpoint), `empty, or a URL such as "http://127.0.0.1:4318"`)
	check("metrics_dir", filepath.IsAbs(f.MetricsDir), "an absolute path")
	for _, t := range []struct {
		key, value string
		to         *time.Duration
	}{
		{"agent_timeout", f.AgentTimeout, &c.AgentTimeout},
		{"freeze_timeout", f.FreezeTimeout, &c.FreezeTimeout},
		{"checkpoint_timeout", f.CheckpointTimeout, &c.CheckpointTimeout},
		{"exec_wait_timeout", f.ExecWaitTimeout, &c.ExecWaitTimeout},
	} {
		v, err := time.ParseDuration(t.value)
		check(t.key, err == nil && v > 0, fmt.Sprintf(`a duration greater than 0, such as "10s" or "2m", not %q`, t.value))
		*t.to = v
	}
	if err := errclass.Join(errs...); err != nil {
		return nil, err
	}
	c.AgentPort = uint32(f.AgentPort) //nolint:gosec // checked above
	c.MaxImageFiles = int(f.MaxImageFiles)
	// They become mount sources.
	c.StateDir = filepath.Clean(c.StateDir)
	c.GuestBundle = filepath.Clean(c.GuestBundle)
	if c.SigningKey == "" {
		c.SigningKey = filepath.Join(c.StateDir, signingKeyName)
	}
	return c, nil
}

// validAddress reports whether something can be served at an address.
func validAddress(address string) bool {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return filepath.IsAbs(path)
	}
	_, port, err := net.SplitHostPort(address)
	return address == "" || err == nil && port != ""
}

// validURL reports whether a collector can be at a URL.
func validURL(text string) bool {
	u, err := url.Parse(text)
	return text == "" || err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

// explain adds key and line, which the decoder's messages lack.
func explain(err error) error {
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		var errs []error
		for _, e := range strict.Errors {
			line, _ := e.Position()
			errs = append(errs, fmt.Errorf("line %d: unknown key %s", line, strings.Join(e.Key(), ".")))
		}
		return errclass.Join(errs...)
	}
	if de, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, column := de.Position()
		if key := de.Key(); len(key) > 0 {
			return fmt.Errorf("line %d: %s: %w", line, strings.Join(key, "."), err)
		}
		return fmt.Errorf("line %d, column %d: not TOML: %w", line, column, err)
	}
	return err
}
