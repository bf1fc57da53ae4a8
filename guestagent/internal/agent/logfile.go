// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"io"
	"os"
	"sync"
)

// maxLog is the size in bytes from which the agent's log is begun again. The one
// before is kept: both are in the guest's memory.
const maxLog = 1 << 20

// logFile is a file of bounded size.
type logFile struct {
	mu   sync.Mutex
	file *os.File
	size int64
}

func openLog(path string) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	return &logFile{file: f, size: size}, err
}

// Write implements io.Writer.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size > 0 && l.size+int64(len(p)) > maxLog {
		path := l.file.Name()
		if err := os.Rename(path, path+".1"); err != nil {
			return 0, err
		}
		next, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return 0, err
		}
		l.file.Close()
		l.file, l.size = next, 0
	}
	n, err := l.file.Write(p)
	l.size += int64(n)
	return n, err
}
