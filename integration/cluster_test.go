// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// object is one of the cluster's, as in its API.
type object = map[string]any

// resources are those that the cluster has, by group and version: the plural
// name and the kind.
var resources = map[string]map[string]string{
	"v1": {"pods": "Pod", "nodes": "Node", "namespaces": "Namespace"},
	"criu.org/v1": {
		"checkpointrestoreoperators": "CheckpointRestoreOperator", "checkpointschedules": "CheckpointSchedule",
		"forensicsnapshotchains": "ForensicSnapshotChain", "podrestores": "PodRestore",
	},
}

// change is one of the cluster's changes.
type change struct {
	version int
	kind    string // ADDED, MODIFIED or DELETED
	path    string
	object  []byte
}

// cluster is as much of a Kubernetes API server as a controller needs: objects
// in memory with versions, lists, watches, updates, and the way to the nodes'
// kubelets. It validates nothing, and whoever asks may do everything.
type cluster struct {
	s      *scenario
	server *httptest.Server
	// kubelet answers requests to the kubelet of a node, below this path.
	kubelet http.Handler

	mu      sync.Mutex
	version int
	objects map[string]object // by path
	changes []change
	changed chan struct{} // closed by the next change
}

// startCluster starts one, until the scenario's end.
func (s *scenario) startCluster(kubelet http.Handler) *cluster {
	s.Helper()
	c := &cluster{s: s, kubelet: kubelet, objects: map[string]object{}, changed: make(chan struct{})}
	c.server = httptest.NewTLSServer(c)
	s.afterContainers(func() error {
		c.server.CloseClientConnections() // of watches
		c.server.Close()
		return nil
	})
	return c
}

// serviceAccount writes what a pod of the cluster gets to reach its API.
func (c *cluster) serviceAccount(dir string) {
	c.s.Helper()
	c.s.check(os.MkdirAll(dir, 0o700))
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.server.Certificate().Raw})
	c.s.check(os.WriteFile(filepath.Join(dir, "ca.crt"), certificate, 0o600))
	c.s.check(os.WriteFile(filepath.Join(dir, "token"), []byte("token"), 0o600))
	c.s.check(os.WriteFile(filepath.Join(dir, "namespace"), []byte("default"), 0o600))
}

// apply creates an object, or replaces it.
func (c *cluster) apply(path, kind string, o object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	group, rest, _ := split(path)
	o["apiVersion"], o["kind"] = group, kind
	meta := o["metadata"].(object)
	if old := c.objects[path]; old != nil {
		meta["uid"], meta["creationTimestamp"] = old["metadata"].(object)["uid"], old["metadata"].(object)["creationTimestamp"]
		meta["generation"] = old["metadata"].(object)["generation"].(int) + 1
	} else {
		meta["uid"], meta["creationTimestamp"], meta["generation"] = fmt.Sprintf("%x", random(16)), time.Now().UTC().Format(time.RFC3339), 1
	}
	meta["name"] = rest[len(rest)-1]
	if len(rest) == 4 {
		meta["namespace"] = rest[1]
	}
	c.put(path, o)
}

// remove removes an object, whatever its finalizers.
func (c *cluster) remove(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.objects[path]
	delete(c.objects, path)
	c.note("DELETED", path, old)
}

// read copies a field of an object into a value.
func (c *cluster) read(path, field string, into any) {
	c.s.Helper()
	c.mu.Lock()
	data, err := json.Marshal(c.objects[path][field])
	c.mu.Unlock()
	c.s.check(err)
	c.s.check(json.Unmarshal(data, into))
}

// put stores an object. The caller holds the lock.
func (c *cluster) put(path string, o object) {
	kind := "MODIFIED"
	if c.objects[path] == nil {
		kind = "ADDED"
	}
	c.objects[path] = o
	c.note(kind, path, o)
}

// note gives an object the next version. The caller holds the lock.
func (c *cluster) note(kind, path string, o object) {
	c.version++
	o["metadata"].(object)["resourceVersion"] = strconv.Itoa(c.version)
	data, _ := json.Marshal(o) // it came as JSON
	c.changes = append(c.changes, change{c.version, kind, path, data})
	close(c.changed)
	c.changed = make(chan struct{})
}

// split splits a path of the API into group and version, and what follows:
// [namespaces NAME] RESOURCE [NAME [SUBRESOURCE...]].
func split(path string) (group string, rest []string, ok bool) {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	n := 2
	if parts[0] == "apis" {
		n = 3
	}
	if len(parts) <= n {
		return strings.Join(parts[min(1, len(parts)):], "/"), nil, len(parts) == n
	}
	return strings.Join(parts[1:n], "/"), parts[n:], true
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	group, rest, ok := split(r.URL.Path)
	kinds := resources[group]
	switch {
	case r.URL.Path == "/api":
		answer(w, http.StatusOK, object{"kind": "APIVersions", "versions": []string{"v1"}})
		return
	case r.URL.Path == "/apis":
		version := object{"groupVersion": "criu.org/v1", "version": "v1"}
		answer(w, http.StatusOK, object{"kind": "APIGroupList", "apiVersion": "v1", "groups": []object{
			{"name": "criu.org", "versions": []object{version}, "preferredVersion": version},
		}})
		return
	case !ok || kinds == nil:
		fail(w, http.StatusNotFound, "NotFound", r.URL.Path)
		return
	case len(rest) == 0:
		list := []object{}
		for plural, kind := range kinds {
			namespaced := kind != "Node" && kind != "Namespace"
			verbs := []string{"get", "list", "watch", "update", "patch"}
			list = append(list, object{"name": plural, "kind": kind, "namespaced": namespaced, "verbs": verbs})
			list = append(list, object{"name": plural + "/status", "kind": kind, "namespaced": namespaced, "verbs": verbs})
		}
		answer(w, http.StatusOK, object{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": list})
		return
	case rest[0] == "nodes" && len(rest) > 3 && rest[2] == "proxy":
		_, below, _ := strings.Cut(r.URL.Path, "/proxy")
		r.URL.Path = below
		c.kubelet.ServeHTTP(w, r)
		return
	}
	if rest[0] == "namespaces" && len(rest) > 2 {
		rest = rest[2:]
	}
	kind := kinds[rest[0]]
	switch {
	case kind == "":
		fail(w, http.StatusNotFound, "NotFound", r.URL.Path)
	case len(rest) == 1 && r.URL.Query().Get("watch") != "":
		c.watch(w, r, group, kind, rest[0])
	case len(rest) == 1:
		c.list(w, r, group, kind, rest[0])
	default:
		path, status := strings.CutSuffix(r.URL.Path, "/status")
		c.one(w, r, path, status)
	}
}

// in reports whether a path is of a collection, in one namespace or in all.
func in(collection, plural, path string) bool {
	dir := filepath.Dir(path)
	return dir == collection || filepath.Base(dir) == plural && filepath.Base(collection) == plural && !strings.Contains(collection, "/namespaces/")
}

func (c *cluster) list(w http.ResponseWriter, r *http.Request, group, kind, plural string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	items := []object{}
	for _, path := range slices.Sorted(maps.Keys(c.objects)) {
		if in(r.URL.Path, plural, path) {
			items = append(items, c.objects[path])
		}
	}
	answer(w, http.StatusOK, object{
		"kind": kind + "List", "apiVersion": group, "metadata": object{"resourceVersion": strconv.Itoa(c.version)}, "items": items,
	})
}

// watch sends what changes, and first what there is if that is asked for.
func (c *cluster) watch(w http.ResponseWriter, r *http.Request, group, kind, plural string) {
	send := func(kind string, o json.RawMessage) bool {
		err := json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": o})
		return err == nil
	}
	w.Header().Set("Content-Type", "application/json")
	since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion")) // none is 0
	if initial := r.URL.Query().Get("sendInitialEvents") == "true"; initial || since == 0 {
		c.mu.Lock()
		for path, o := range c.objects {
			if in(r.URL.Path, plural, path) {
				data, _ := json.Marshal(o) // it came as JSON
				send("ADDED", data)
			}
		}
		since = c.version
		c.mu.Unlock()
		if initial {
			send("BOOKMARK", fmt.Appendf(nil,
				`{"kind": %q, "apiVersion": %q, "metadata": {"resourceVersion": "%d", "annotations": {"k8s.io/initial-events-end": "true"}}}`, kind, group, since))
		}
	}
	for {
		c.mu.Lock()
		changes, changed := c.changes, c.changed
		c.mu.Unlock()
		for _, e := range changes {
			if e.version > since && in(r.URL.Path, plural, e.path) && !send(e.kind, e.object) {
				return
			}
		}
		if n := len(changes); n > 0 {
			since = max(since, changes[n-1].version)
		}
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// one reads or changes an object.
func (c *cluster) one(w http.ResponseWriter, r *http.Request, path string, status bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.objects[path]
	if old == nil {
		fail(w, http.StatusNotFound, "NotFound", path)
		return
	}
	var body object
	if r.Method != http.MethodGet {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			fail(w, http.StatusUnsupportedMediaType, "UnsupportedMediaType", err.Error())
			return
		}
	}
	var next object
	switch r.Method {
	case http.MethodGet:
		answer(w, http.StatusOK, old)
		return
	case http.MethodPut:
		next = body
	case http.MethodPatch:
		next = merged(old, body)
	default:
		fail(w, http.StatusMethodNotAllowed, "MethodNotAllowed", r.Method)
		return
	}
	if v, _ := next["metadata"].(object)["resourceVersion"].(string); v != "" && v != old["metadata"].(object)["resourceVersion"] {
		fail(w, http.StatusConflict, "Conflict", path)
		return
	}
	kept := maps.Clone(old)
	kept["metadata"] = maps.Clone(old["metadata"].(object)) // a reader may have the old one
	if status {
		kept["status"] = next["status"]
	} else {
		for _, field := range []string{"spec", "data"} {
			if next[field] != nil {
				kept[field] = next[field]
			}
		}
		for _, field := range []string{"annotations", "labels", "finalizers"} {
			kept["metadata"].(object)[field] = next["metadata"].(object)[field]
		}
	}
	c.put(path, kept)
	answer(w, http.StatusOK, kept)
}

// merged applies a merge patch (RFC 7386).
func merged(o, patch object) object {
	out := maps.Clone(o)
	if out == nil {
		out = object{}
	}
	for key, value := range patch {
		switch v := value.(type) {
		case nil:
			delete(out, key)
		case object:
			inner, _ := out[key].(object)
			out[key] = merged(inner, v)
		default:
			out[key] = v
		}
	}
	return out
}

func answer(w http.ResponseWriter, status int, o object) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(o) // the client may be gone
}

func fail(w http.ResponseWriter, status int, reason, message string) {
	answer(w, status, object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": status})
}
