// Package entry is where the guest's binary starts when the linker is told so
// (-E, see the Makefile): before Go's runtime, which takes longer to start than
// all that an exec into a restored container does besides, above all where the
// guest is emulated, and whose threads and heap make every fork slow. Three of
// the binary's modes need none of it: they run on the first thread and its
// stack, without a heap, a scheduler and signal handlers.
//
// Without it, and on architectures that it is not written for, these modes are
// Go programs as the others are.
package entry
