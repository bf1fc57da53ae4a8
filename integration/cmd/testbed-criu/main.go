// SPDX-License-Identifier: Apache-2.0

// testbed-criu replaces CRIU in guest bundles that are unfit on purpose. It
// answers the two questions that the guest agent asks a CRIU before it uses it:
// the version (by CRIU's RPC, as "criu swrk FD") and whether the kernel is fit
// ("criu check"). The answers are in the file answers.json next to it. It does
// nothing else.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

type answers struct {
	Major int32 `json:"major"`
	Minor int32 `json:"minor"`
	// Check is what `criu check` complains about, if anything.
	Check string `json:"check"`
}

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	data, err := os.ReadFile(filepath.Join(filepath.Dir(args[0]), "answers.json"))
	if err != nil {
		return err
	}
	var a answers
	if err := json.Unmarshal(data, &a); err != nil {
		return err
	}
	switch {
	case len(args) == 3 && args[1] == "swrk":
		fd, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return a.version(fd)
	case len(args) == 2 && args[1] == "check":
		if a.Check != "" {
			return errors.New(a.Check)
		}
		fmt.Println("Looks good.")
		return nil
	}
	return fmt.Errorf("unknown arguments %q", args[1:])
}

// version answers one request on a SOCK_SEQPACKET socket.
func (a answers) version(fd int) error {
	buffer := make([]byte, 4<<10)
	n, err := unix.Read(fd, buffer)
	if err != nil {
		return os.NewSyscallError("read", err)
	}
	var request rpc.CriuReq
	if err := proto.Unmarshal(buffer[:n], &request); err != nil {
		return err
	}
	if request.GetType() != rpc.CriuReqType_VERSION {
		return fmt.Errorf("unknown request %s", request.GetType())
	}
	answer, err := proto.Marshal(&rpc.CriuResp{
		Type: request.Type, Success: proto.Bool(true),
		Version: &rpc.CriuVersion{MajorNumber: proto.Int32(a.Major), MinorNumber: proto.Int32(a.Minor)},
	})
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, answer)
	return os.NewSyscallError("write", err)
}
