// SPDX-License-Identifier: Apache-2.0

package events

import (
	"container/list"
)

// recent is a set that forgets its oldest elements.
type recent[T comparable] struct {
	limit    int
	elements map[T]*list.Element
	// order has the elements, the oldest first.
	order *list.List
}

func newRecent[T comparable](limit int) *recent[T] {
	return &recent[T]{limit: limit, elements: make(map[T]*list.Element), order: list.New()}
}

func (r *recent[T]) has(v T) bool { return r.elements[v] != nil }

func (r *recent[T]) add(v T) {
	if r.has(v) {
		return
	}
	r.elements[v] = r.order.PushBack(v)
	if len(r.elements) > r.limit {
		r.remove(r.order.Front().Value.(T)) //nolint:forcetypeassert // the list has nothing else
	}
}

func (r *recent[T]) remove(v T) {
	if e := r.elements[v]; e != nil {
		r.order.Remove(e)
		delete(r.elements, v)
	}
}

func (r *recent[T]) removeFunc(remove func(T) bool) {
	for v := range r.elements {
		if remove(v) {
			r.remove(v)
		}
	}
}
