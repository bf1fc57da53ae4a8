// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

// nodeKey is the node's own key, which is read once, and made by whoever needs it
// first.
type nodeKey struct {
	mu  sync.Mutex
	key *signing.Key
}

func (n *nodeKey) load(path string) (*signing.Key, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.key != nil {
		return n.key, nil
	}
	key, err := signing.Load(path)
	if err == nil {
		n.key = key
	}
	return key, err
}

// trustedKeys are the node's own key and those that config.toml names.
func (s *Service) trustedKeys() ([]ed25519.PublicKey, error) {
	own, err := s.nodeKey.load(s.cfg.SigningKey)
	if err != nil {
		return nil, err
	}
	return append([]ed25519.PublicKey{own.Public()}, s.cfg.TrustedKeys...), nil
}

// permit refuses an image set that this container may not be restored from,
// whatever is in it. It reports whether a trusted key has signed it.
func (c *container) permit(ctx context.Context, set *imageset.Set) (signed bool, _ error) {
	if err := c.permitNamespace(set.Manifest); err != nil {
		return false, err
	}
	return c.permitSigner(ctx, set)
}

// errForeign does not say whose the image set is.
var errForeign = errcode.OtherNamespace.Wrap(errors.New("it was not made of a container of this pod's namespace: checkpoints are restored in their own"))

// permitNamespace keeps pods from the memory of pods in other namespaces, where
// whoever created this one may have no rights.
func (c *container) permitNamespace(m *imageset.Manifest) error {
	if annotations.MadeByCRI(c.annotations) && m.Container.PodNamespace != annotations.PodNamespace(c.annotations) {
		return errForeign
	}
	return nil
}

// permitSigner refuses what no trusted key has signed, where the configuration
// demands a signature, and warns of it elsewhere. What has been changed since it
// was signed is always refused.
func (c *container) permitSigner(ctx context.Context, set *imageset.Set) (signed bool, _ error) {
	keys, err := c.s.trustedKeys()
	if err == nil {
		err = set.Verify(keys)
	}
	if err == nil || errors.Is(err, imageset.ErrForged) {
		return err == nil, err
	}
	inPod := annotations.MadeByCRI(c.annotations)
	if inPod && !c.s.cfg.RestoreUnsigned || !inPod && c.s.cfg.RequireSignature {
		return false, fmt.Errorf("%w: %s", err, c.signerAdvice(err))
	}
	log.G(ctx).WithError(err).WithField("container", c.id).Warn("restoring a checkpoint that no trusted key has signed: its processes may be anybody's")
	return false, nil
}

func (c *container) signerAdvice(err error) string {
	allow := "set require_signature = false in config.toml"
	if annotations.MadeByCRI(c.annotations) {
		allow = "set restore_unsigned = true in config.toml"
	}
	switch {
	case errors.Is(err, imageset.ErrUntrusted):
		return "add the public key of the node that made it to trusted_keys in config.toml, or " + allow
	case errors.Is(err, imageset.ErrUnsigned):
		return "make it on a node that signs its checkpoints, or " + allow
	}
	return "mend the key, or " + allow
}
