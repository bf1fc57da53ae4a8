// Package version says which build of kata-checkpoint this is. The shim and the
// agent both report it, so that one can name the other when they do not match.
package version

// Version is set at link time (see the Makefile) to what `git describe` says.
var Version = "dev"
