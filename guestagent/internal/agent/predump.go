// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/launch"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// PreDump implements the service.
func (a *Agent) PreDump(ctx context.Context, r *api.PreDumpRequest) (*api.PreDumpResponse, error) {
	ctx, end, err := a.ops.begin(ctx, r.GetContainerId(), dumping)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	defer end()
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	images, err := a.inExchange(c.ID, r.GetDirectory())
	if err == nil && r.GetParent() != "" {
		_, err = a.inExchange(c.ID, r.GetParent())
	}
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if frozen, err := cgroup.Frozen(c.tree()); err != nil || frozen {
		return nil, errclass.ToRPC(c.explain(errclass.Join(errclass.Precondition(errcode.BadAgentRequest, "pre-dump: container %s is frozen", c.ID), err)))
	}
	if err := os.Mkdir(images, 0o700); err != nil {
		return nil, errclass.ToRPC(fmt.Errorf("make the directory for the images: %w", err))
	}
	err = a.preDump(ctx, c, r.GetParent(), images)
	var size int64
	if err == nil {
		size, err = pagesIn(images)
	}
	if err != nil {
		// CRIU has frozen it, and may have been killed before it thawed it.
		return nil, errclass.ToRPC(errclass.Join(c.explain(err), os.RemoveAll(images), cgroup.Thaw(c.tree())))
	}
	return &api.PreDumpResponse{Bytes: uint64(size)}, nil
}

func (a *Agent) preDump(ctx context.Context, c *container, parent, images string) error {
	ph := newPhases(ctx, "checkpoint", c.ID)
	op, err := criu.NewOp(filepath.Join(a.dir, "ops"), launch.Job{Target: c.root().PID, Join: []string{"uts", "ipc"}}, 0)
	if err != nil {
		return err
	}
	defer op.Close()
	opts := op.Options(images)
	opts.Pid = proto.Int32(int32(c.root().PID)) //nolint:gosec // a pid
	opts.LeaveRunning = proto.Bool(true)
	opts.TrackMem = proto.Bool(true)
	opts.FreezeCgroup = proto.String(c.tree())
	if parent != "" {
		opts.ParentImg = proto.String(parentImages(parent))
	}
	ph.done("prepare pre-dump")
	defer dropBehind(images, dropBehindFrom)()
	if err := op.PreDump(ctx, opts); err != nil {
		return err
	}
	ph.done("criu pre-dump")
	return nil
}

// parentImages is how CRIU gets from a directory of images to another one in the
// exchange mount.
func parentImages(directory string) string { return filepath.Join("..", directory) }

// pagesIn is how much memory is in a directory of images, in bytes.
func pagesIn(images string) (size int64, err error) {
	found, err := filepath.Glob(filepath.Join(images, "pages-*.img"))
	for _, path := range found {
		st, e := os.Lstat(path)
		if e != nil {
			return 0, e
		}
		size += st.Size()
	}
	return size, err
}

// foldParents makes a dump flat that is based on pre-dumps, and writes where the
// content of its pages is.
func (a *Agent) foldParents(ctx context.Context, id string, r *api.CheckpointRequest) error {
	if len(r.GetParents()) == 0 {
		return nil
	}
	var directories []string
	for _, name := range slices.Concat(r.GetParents(), []string{r.GetDirectory()}) {
		dir, err := a.inExchange(id, name)
		if err != nil {
			return err
		}
		directories = append(directories, dir)
	}
	folded, err := fold(directories)
	if err != nil {
		return errcode.DumpFailed.Errorf("fold the pre-dumps of container %s: %w", id, err)
	}
	data, err := proto.Marshal(folded)
	if err != nil {
		return err
	}
	images := directories[len(directories)-1]
	if err := os.Remove(filepath.Join(images, "parent")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	log.G(ctx).WithField("container", id).WithField("rounds", len(r.GetParents())).Info("folded pre-dumps")
	return os.WriteFile(filepath.Join(images, api.FoldedName), data, 0o600)
}
