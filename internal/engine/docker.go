// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// maxAnswer bounds an answer of Docker, in bytes.
const maxAnswer = 4 << 20

// docker calls Docker's API and decodes its answer, if into is not nil.
func (n *Node) docker(ctx context.Context, method, path string, into any) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", n.DockerSocket)
	}}
	r, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return errcode.NoEngine.Errorf("ask Docker at %s: %w", n.DockerSocket, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return errcode.NoEngine.Errorf("ask Docker at %s: %w", n.DockerSocket, err)
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		var failed struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(data, &failed) != nil || failed.Message == "" {
			failed.Message = resp.Status
		}
		return errcode.NoEngine.Errorf("docker: %s", text.Line(failed.Message, text.MaxError))
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(data, into)
}

// dockerContainer returns the ID and the name of a container of Docker's.
func (n *Node) dockerContainer(ctx context.Context, ref string) (id, name string, err error) {
	var answer struct{ ID, Name string }
	if err := n.docker(ctx, http.MethodGet, "/containers/"+url.PathEscape(ref)+"/json", &answer); err != nil {
		return "", "", err
	}
	return answer.ID, strings.TrimPrefix(answer.Name, "/"), nil
}

// dockerRoot is where Docker keeps its containers.
func (n *Node) dockerRoot(ctx context.Context) (string, error) {
	var answer struct{ DockerRootDir string }
	if err := n.docker(ctx, http.MethodGet, "/info", &answer); err != nil {
		return "", err
	}
	return answer.DockerRootDir, nil
}
