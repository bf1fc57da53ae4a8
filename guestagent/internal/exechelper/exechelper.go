// Package exechelper is the process that Kata starts when somebody execs into
// a restored container. Kata puts it into the placeholder's namespaces, where
// the restored processes are not; so it only holds the stdio and the exit
// status, while the guest agent, who is root, forks the real process inside
// the restored namespaces on copies of this process's descriptors.
//
// It trusts nothing and opens nothing: the agent finds it by its command line
// and takes the descriptors itself (pidfd_getfd). No socket is involved that a
// container could reach.
package exechelper

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// StatusFD is the descriptor that the agent writes to: the write end of a pipe
// of this process. It is there when all else that the agent takes is.
const StatusFD = 200

// executable is opened and closed once the helper is ready, which the agent
// watches for. It learns nothing else by it.
const executable = "/proc/self/exe"

// Exit statuses of the helper when there is none of the real process's.
const (
	statusLost    = 255 // the agent has gone, and the process's status with it
	statusFailure = 254 // the helper could not do its part
)

// Message is what the agent writes: first with the pid of the real process in
// the placeholder's pid namespace, then with its wait status.
type Message struct {
	PID    int32
	Ended  uint32
	Status uint32
}

// Size of a Message in bytes.
const Size = 12

// Encode writes a message in one piece.
func (m Message) Encode() []byte {
	b := make([]byte, 0, Size)
	b = binary.NativeEndian.AppendUint32(b, uint32(m.PID)) //nolint:gosec // its bits
	b = binary.NativeEndian.AppendUint32(b, m.Ended)
	return binary.NativeEndian.AppendUint32(b, m.Status)
}

func decode(b []byte) Message {
	return Message{
		PID:    int32(binary.NativeEndian.Uint32(b)), //nolint:gosec // its bits
		Ended:  binary.NativeEndian.Uint32(b[4:]),
		Status: binary.NativeEndian.Uint32(b[8:]),
	}
}

// Run passes signals on until the real process has ended and returns the
// status to exit with.
func Run() int {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return statusFailure
	}
	if err := unix.Dup3(p[1], StatusFD, unix.O_CLOEXEC); err != nil {
		return statusFailure
	}
	unix.Close(p[1])
	if exe, err := unix.Open(executable, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(exe) // the agent has heard it
	}
	in := os.NewFile(uintptr(p[0]), "status")

	messages := make(chan Message)
	go func() {
		defer close(messages)
		b := make([]byte, Size)
		for {
			if _, err := io.ReadFull(in, b); err != nil {
				return
			}
			messages <- decode(b)
		}
	}()
	pid := 0
	for {
		select {
		case m, ok := <-messages:
			if !ok {
				return statusLost
			}
			if m.Ended != 0 {
				return exitStatus(unix.WaitStatus(m.Status))
			}
			pid = int(m.PID)
			// With the agent's copy as the only writer, its end shows as an end of file.
			unix.Close(StatusFD)
		case s := <-signals:
			if sig, ok := s.(unix.Signal); ok && pid > 0 && sig != unix.SIGCHLD && sig != unix.SIGURG {
				if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
					continue
				}
			}
		}
	}
}

func exitStatus(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
