// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"fmt"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// The agent is in the guest, and whoever owns the guest can speak in its place.
// Its answers are checked here, and nowhere else, before they are decoded: how
// many elements each list has, how long each text is, and that the text can be
// printed. An answer that no agent of ours gives ends the connection.

const (
	// maxList is the number of elements of a list that maxLists does not name.
	maxList = 64
	// maxText is the length of a string or a byte string in bytes: the longest
	// path has as many.
	maxText = 4096
)

// maxTexts has the strings that may be longer than maxText.
var maxTexts = map[protoreflect.Name]int{"criu_check": text.MaxError, "problems": text.MaxError}

// maxLists has the lists that may be longer than maxList.
var maxLists = map[protoreflect.Name]int{
	"externals":    4096,
	"open_files":   1 << 16,
	"connections":  1 << 16,
	"addresses":    4096,
	"sockets":      1 << 16,
	"memberships":  1024,
	"sources":      1024,
	"attributes":   1 << 15,
	"cpu_features": 1024,
}

// anyText are strings that a container's processes choose: package imageset
// says which of them an image set may have.
var anyText = map[protoreflect.Name]bool{"destination": true, "hostname": true}

// violationError is the error of an answer that no agent gives.
type violationError struct{ what string }

func violation(format string, args ...any) error { return violationError{fmt.Sprintf(format, args...)} }

// Error implements error.
func (e violationError) Error() string {
	return "the agent in the guest does not keep to the protocol, and its connection was closed: " + e.what
}

// checkAnswers is a client's interceptor. After a violation it calls hangUp.
func checkAnswers(hangUp func(why error)) ttrpc.UnaryClientInterceptor {
	return func(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, next ttrpc.Invoker) error {
		if err := next(ctx, req, resp); err != nil {
			return err
		}
		if st := resp.GetStatus(); st != nil {
			st.Message = text.Lines(st.GetMessage(), text.MaxError)
			st.Details = nil
		}
		err := checkAnswer(req.GetMethod(), resp.GetPayload())
		if err != nil {
			hangUp(err)
		}
		return err
	}
}

// methods are the agent's.
var methods = api.File_internal_api_agent_proto.Services().ByName("Agent").Methods()

func checkAnswer(method string, payload []byte) error {
	m := methods.ByName(protoreflect.Name(method))
	if m == nil {
		return fmt.Errorf("the agent has no method %s", method)
	}
	if err := checkMessage(payload, m.Output()); err != nil {
		return violation("its answer to %s %s", method, err)
	}
	return nil
}

// checkMessage checks an encoded message and those in it.
func checkMessage(data []byte, desc protoreflect.MessageDescriptor) error {
	counts := make(map[protowire.Number]int)
	for len(data) > 0 {
		number, wire, n := protowire.ConsumeTag(data)
		if n < 0 {
			return protowire.ParseError(n)
		}
		data = data[n:]
		size := protowire.ConsumeFieldValue(number, wire, data)
		if size < 0 {
			return protowire.ParseError(size)
		}
		value := data[:size]
		data = data[size:]

		counts[number]++
		limit := maxList
		field := desc.Fields().ByNumber(number)
		if field != nil {
			if !field.IsList() {
				limit = 1
			} else if more := maxLists[field.Name()]; more > 0 {
				limit = more
			}
		}
		if counts[number] > limit {
			return fmt.Errorf("has more than %d elements in field %d", limit, number)
		}
		if field == nil || wire != protowire.BytesType {
			continue // of a newer agent, or a number
		}
		content, _ := protowire.ConsumeBytes(value)
		if err := checkField(content, field); err != nil {
			return err
		}
	}
	return nil
}

func checkField(content []byte, field protoreflect.FieldDescriptor) error {
	switch field.Kind() {
	case protoreflect.MessageKind:
		return checkMessage(content, field.Message())
	case protoreflect.StringKind:
		if !anyText[field.Name()] && !text.IsLines(content) {
			return fmt.Errorf("has a %s that cannot be printed", field.Name())
		}
	}
	if len(content) > max(maxText, maxTexts[field.Name()]) {
		return fmt.Errorf("has a %s of %d bytes", field.Name(), len(content))
	}
	return nil
}
