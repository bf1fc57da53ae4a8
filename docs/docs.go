// SPDX-License-Identifier: Apache-2.0

// Package docs has those pages of the documentation that the programs quote.
package docs

import _ "embed"

// Troubleshooting is the page with an entry for each code of package
// internal/errcode.
//
//go:embed troubleshooting.md
var Troubleshooting string
