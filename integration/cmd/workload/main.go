// workload is the program that runs in the containers of the scenarios, the benchmarks and the demonstration. See package workload.
package main

import (
	"fmt"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

func main() {
	if err := workload.Main(os.Args[1:], os.Stdout); err != nil {
		// On stdout, among the numbers: a scenario reads there what went wrong, and when.
		fmt.Println("broken:", err)
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}
