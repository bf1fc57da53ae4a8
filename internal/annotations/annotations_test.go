// SPDX-License-Identifier: Apache-2.0

package annotations

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// parsed is everything that can be read from annotations.
type parsed struct {
	Kind       Kind
	Sandbox    string
	CRI        bool
	Image      string
	Container  string
	Namespace  string
	UID        string
	After      string
	TCP        string
	Address    string
	Thaw       string
	PreDump    int
	HasPreDump bool
	Externals  []string
	Archive    string
}

func parse(id string, annotations map[string]string) (p parsed, err error) {
	errs := make([]error, 7)
	p.Kind, p.Sandbox, errs[0] = Place(id, annotations)
	p.After, errs[1] = After(annotations)
	p.TCP, errs[2] = TCP(annotations)
	p.Address, errs[4] = Address(annotations)
	p.Thaw, errs[5] = Thaw(annotations)
	p.PreDump, p.HasPreDump, errs[6] = PreDump(annotations)
	p.Externals, errs[3] = ExternalMounts(annotations)
	p.CRI = MadeByCRI(annotations)
	p.Image = ImageName(annotations)
	p.Container = ContainerName(annotations)
	p.Namespace = PodNamespace(annotations)
	p.UID = PodUID(annotations)
	p.Archive = RestoreArchive(annotations)
	return p, errors.Join(errs...)
}

func TestAnnotations(t *testing.T) {
	for name, tc := range map[string]struct {
		in   map[string]string
		want parsed
		err  string
	}{
		"no annotations":       {want: parsed{Kind: Single, Sandbox: "id"}},
		"ctr, nerdctl, docker": {in: map[string]string{"nerdctl/name": "x"}, want: parsed{Kind: Single, Sandbox: "id"}},

		"containerd's CRI: a sandbox": {
			in:   map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "id"},
			want: parsed{Kind: Sandbox, Sandbox: "id", CRI: true},
		},
		"containerd's CRI: a container": {
			in: map[string]string{
				"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "sb",
				"io.kubernetes.cri.container-name": "web", "io.kubernetes.cri.image-name": "docker.io/library/web:1",
				"io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.sandbox-uid": "u-1",
				"kata-checkpoint.dev/restore.web": "web.tar", "kata-checkpoint.dev/restore.db": "db.tar",
			},
			want: parsed{
				Kind: InPod, Sandbox: "sb", CRI: true, Container: "web", Image: "docker.io/library/web:1",
				Namespace: "shop", UID: "u-1", Archive: "web.tar",
			},
		},
		"CRI-O: a sandbox": {in: map[string]string{"io.kubernetes.cri-o.ContainerType": "sandbox"}, want: parsed{Kind: Sandbox, Sandbox: "id", CRI: true}},
		"CRI-O: a container": {
			in: map[string]string{
				"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "sb",
				"io.kubernetes.container.name": "web", "io.kubernetes.cri-o.ImageName": "web:1",
				"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.uid": "u-1",
			},
			want: parsed{Kind: InPod, Sandbox: "sb", CRI: true, Container: "web", Image: "web:1", Namespace: "shop", UID: "u-1"},
		},
		"dockershim: a sandbox":               {in: map[string]string{"io.kubernetes.docker.type": "podsandbox"}, want: parsed{Kind: Sandbox, Sandbox: "id", CRI: true}},
		"a container's own sandbox":           {in: InPodOf("sb"), want: parsed{Kind: InPod, Sandbox: "sb", CRI: true}},
		"a container without a sandbox":       {in: map[string]string{"io.kubernetes.cri.container-type": "container"}, err: "sandbox-id"},
		"a container that is its own sandbox": {in: InPodOf("id"), err: "itself"},
		"an unknown type":                     {in: map[string]string{"io.kubernetes.cri.container-type": "pod"}, err: `"pod"`},

		"stop":          {in: map[string]string{AfterKey: "stop"}, want: parsed{Sandbox: "id", After: Stop}},
		"leave running": {in: map[string]string{AfterKey: "leave-running"}, want: parsed{Sandbox: "id", After: LeaveRunning}},
		"neither":       {in: map[string]string{AfterKey: "exit"}, err: `kata-checkpoint.dev/after is "exit" and must be "stop" or "leave-running"`},
		"an empty one":  {in: map[string]string{AfterKey: ""}, err: `kata-checkpoint.dev/after is ""`},

		"TCP established": {in: map[string]string{TCPKey: "established"}, want: parsed{Sandbox: "id", TCP: TCPEstablished}},
		"TCP close":       {in: map[string]string{TCPKey: "close"}, want: parsed{Sandbox: "id", TCP: TCPClose}},
		"TCP else":        {in: map[string]string{TCPKey: "keep"}, err: `kata-checkpoint.dev/tcp is "keep" and must be "established" or "close"`},

		"thaw after the dump": {in: map[string]string{ThawKey: "after-dump"}, want: parsed{Sandbox: "id", Thaw: AfterDump}},
		"thaw at the resume":  {in: map[string]string{ThawKey: "at-resume"}, want: parsed{Sandbox: "id", Thaw: AtResume}},
		"thaw else":           {in: map[string]string{ThawKey: "early"}, err: `kata-checkpoint.dev/thaw is "early" and must be "after-dump" or "at-resume"`},

		"no pre-dumps":       {in: map[string]string{PreDumpKey: "off"}, want: parsed{Sandbox: "id", HasPreDump: true}},
		"pre-dumps":          {in: map[string]string{PreDumpKey: "auto"}, want: parsed{Sandbox: "id", PreDump: MaxPreDumps, HasPreDump: true}},
		"two pre-dumps":      {in: map[string]string{PreDumpKey: "2"}, want: parsed{Sandbox: "id", PreDump: 2, HasPreDump: true}},
		"too many pre-dumps": {in: map[string]string{PreDumpKey: "17"}, err: `kata-checkpoint.dev/pre-dump is "17" and must be "off", "auto" or a number from 1 to 16`},
		"no number":          {in: map[string]string{PreDumpKey: "+2"}, err: `"+2"`},

		"address stays": {in: map[string]string{AddressKey: "stays"}, want: parsed{Sandbox: "id", Address: AddressStays}},
		"address else":  {in: map[string]string{AddressKey: ""}, err: `kata-checkpoint.dev/address is "" and must be "stays"`},

		"external mounts":            {in: map[string]string{ExternalMountsKey: " /tmp , /etc/../data/,"}, want: parsed{Sandbox: "id", Externals: []string{"/tmp", "/data"}}},
		"no external mount":          {in: map[string]string{ExternalMountsKey: ",, "}, want: parsed{Sandbox: "id"}},
		"a relative external mount":  {in: map[string]string{ExternalMountsKey: "x"}, err: `"x" is not an absolute path`},
		"the root as external mount": {in: map[string]string{ExternalMountsKey: "/a/.."}, err: "root file system"},

		"an archive without a container's name": {in: map[string]string{RestorePrefix: "x.tar"}, want: parsed{Sandbox: "id"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parse("id", tc.in)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v lacks %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
