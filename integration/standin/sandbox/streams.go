// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"io"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/stdio"
)

// Streams are the streams of a process in the guest.
func (s *Sandbox) Streams(id, execID string) stdio.Guest {
	p := stream{s.Agent, id, execID}
	return stdio.Guest{
		Stdin:  stdin{p},
		Stdout: output{p, s.Agent.ReadStdout},
		Stderr: output{p, s.Agent.ReadStderr},
	}
}

type stream struct {
	agent      api.AgentService
	id, execID string
}

type stdin struct{ stream }

func (s stdin) Write(data []byte) (int, error) {
	for written := 0; written < len(data); {
		chunk := data[written:min(written+api.MaxChunk, len(data))]
		if _, err := s.agent.WriteStdin(context.Background(), &api.WriteStreamRequest{Id: s.id, ExecId: s.execID, Data: chunk}); err != nil {
			return written, err
		}
		written += len(chunk)
	}
	return len(data), nil
}

func (s stdin) Close() error {
	_, err := s.agent.CloseStdin(context.Background(), &api.ProcessRequest{Id: s.id, ExecId: s.execID})
	return err
}

type output struct {
	stream
	read func(context.Context, *api.ReadStreamRequest) (*api.ReadStreamResponse, error)
}

func (o output) Read(buffer []byte) (int, error) {
	answer, err := o.read(context.Background(), &api.ReadStreamRequest{Id: o.id, ExecId: o.execID, Len: uint32(min(len(buffer), api.MaxChunk))})
	if err != nil {
		return 0, err
	}
	if answer.Eof {
		return 0, io.EOF
	}
	return copy(buffer, answer.Data), nil
}
