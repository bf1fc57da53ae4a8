// SPDX-License-Identifier: Apache-2.0

package errclass

import "strings"

type joined []error

// Join is [errors.Join] for a message of one line: the messages are joined by
// semicolons.
func Join(errs ...error) error {
	var j joined
	for _, err := range errs {
		if err != nil {
			j = append(j, err)
		}
	}
	switch len(j) {
	case 0:
		return nil
	case 1:
		return j[0]
	}
	return j
}

func (j joined) Error() string {
	messages := make([]string, len(j))
	for i, err := range j {
		messages[i] = err.Error()
	}
	return strings.Join(messages, "; ")
}

func (j joined) Unwrap() []error { return j }
