// SPDX-License-Identifier: Apache-2.0

// workload runs in the containers of the scenarios and the benchmarks. See
// package workload.
package main

import (
	"fmt"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

func main() {
	if err := workload.Main(os.Args[1:], os.Stdout); err != nil {
		// On stdout, between the numbers, where a scenario reads what failed
		// and when.
		fmt.Println("broken:", err)
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}
