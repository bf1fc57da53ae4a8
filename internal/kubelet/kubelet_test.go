// SPDX-License-Identifier: Apache-2.0

package kubelet_test

import (
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/kubelet"
)

// cluster is an API server with a kubelet behind it, and a kubeconfig for it.
func cluster(t *testing.T, checkpoint http.HandlerFunc) *kubelet.Cluster {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /prefix/api/v1/namespaces/shop/pods/{pod}", func(w http.ResponseWriter, r *http.Request) {
		switch r.PathValue("pod") {
		case "web":
			fmt.Fprint(w, `{"spec": {"nodeName": "n1", "containers": [{"name": "app"}, {"name": "log"}]}, "status": {"phase": "Running"}}`)
		case "waits":
			fmt.Fprint(w, `{"spec": {"containers": [{"name": "app"}]}, "status": {"phase": "Pending"}}`)
		default:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"kind": "Status", "message": "pods %q not found"}`, r.PathValue("pod"))
		}
	})
	mux.HandleFunc("POST /prefix/api/v1/nodes/n1/proxy/checkpoint/shop/web/{container}", checkpoint)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	config := filepath.Join(t.TempDir(), "config")
	for name, content := range map[string]string{
		ca: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})),
		config: fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: secret}}, {name: nobody, user: {}}]
contexts: [{name: good, context: {cluster: c, user: u, namespace: shop}}, {name: bad, context: {cluster: c, user: nobody}}]
current-context: bad
`, server.URL+"/prefix", ca),
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := kubelet.Connect(kubelet.Options{Kubeconfig: config, Context: "good"})
	if err != nil {
		t.Fatal(err)
	}
	if c.Namespace != "shop" {
		t.Errorf("the namespace is %q, not that of the context", c.Namespace)
	}
	return c
}

func TestCheckpoint(t *testing.T) {
	c := cluster(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("timeout") != "90" {
			t.Errorf("query %q", r.URL.RawQuery)
		}
		fmt.Fprintf(w, `{"items": ["/var/lib/kubelet/checkpoints/checkpoint-%s.tar"]}`, r.PathValue("container"))
	})
	of := func(container string) kubelet.Archive {
		return kubelet.Archive{
			Namespace: "shop", Pod: "web", Container: container, Node: "n1", Path: "/var/lib/kubelet/checkpoints/checkpoint-" + container + ".tar",
			Annotation: "kata-checkpoint.dev/restore." + container, Value: "checkpoint-" + container + ".tar",
		}
	}
	for container, want := range map[string][]kubelet.Archive{"": {of("app"), of("log")}, "log": {of("log")}} {
		got, err := c.Checkpoint(t.Context(), "web", container, 90*time.Second)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%v, -want +got:\n%s", err, diff)
		}
	}
	for want, args := range map[string][2]string{
		`pods "other" not found`: {"other", ""}, "is pending": {"waits", ""}, "has no container db": {"web", "db"}, "--namespace": {"shop/web", ""},
	} {
		code := errcode.NoPod
		if strings.Contains(args[0], "/") {
			code = errcode.Usage
		}
		if _, err := c.Checkpoint(t.Context(), args[0], args[1], time.Second); errcode.Of(err) != code || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}

func TestRefused(t *testing.T) {
	for want, answer := range map[string]func(http.ResponseWriter){
		"the verb create on nodes/proxy": func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"message": "nodes n1 is forbidden"}`)
		},
		"ContainerCheckpoint": func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"has an open TCP connection": func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, "process a (PID 1) has an open TCP connection\x1b[0m")
		},
		"names no archive": func(w http.ResponseWriter) { fmt.Fprint(w, `{"items": []}`) },
	} {
		c := cluster(t, func(w http.ResponseWriter, r *http.Request) {
			if r.PathValue("container") == "app" {
				fmt.Fprint(w, `{"items": ["/x/app.tar"]}`)
				return
			}
			answer(w)
		})
		made, err := c.Checkpoint(t.Context(), "web", "", time.Second)
		if errcode.Of(err) != errcode.Kubelet || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "container log of pod shop/web on node n1") || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%v, want %q", err, want)
		}
		if len(made) != 1 || made[0].Value != "app.tar" {
			t.Errorf("what was made before is %v", made)
		}
	}
}

func TestKubeconfig(t *testing.T) {
	if _, err := kubelet.Connect(kubelet.Options{Kubeconfig: filepath.Join(t.TempDir(), "none")}); errcode.Of(err) != errcode.Kubeconfig || !strings.Contains(err.Error(), "kubeconfig: ") {
		t.Errorf("%v", err)
	}
}
