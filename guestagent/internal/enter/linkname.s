// This file lets functions of this package have no body (go:linkname).
