// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/network"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vm"
)

// boot starts the VM with a card for each interface in the network namespace.
func (s *Sandbox) boot(ctx context.Context) error {
	cards, err := s.attach()
	if err != nil {
		return err
	}
	defer network.Close(cards)
	s.vm, err = vm.Start(ctx, s.config, s.ID, s.share.Dir(), s.netns, cards)
	return err
}

// plug adds cards for the interfaces that the engine's hooks have added.
func (s *Sandbox) plug(ctx context.Context) error {
	cards, err := s.attach()
	if err != nil {
		return err
	}
	defer network.Close(cards)
	return s.vm.Plug(ctx, cards)
}

func (s *Sandbox) attach() ([]network.Card, error) {
	if s.network == nil {
		return nil, nil
	}
	return s.network.Attach()
}

// updateNetwork has the guest configure the interfaces.
func (s *Sandbox) updateNetwork(ctx context.Context) error {
	if s.network == nil {
		return nil
	}
	request, err := s.network.Describe()
	if err != nil || len(request.Interfaces) == 0 {
		return err
	}
	_, err = s.Agent.UpdateNetwork(ctx, request)
	return err
}
