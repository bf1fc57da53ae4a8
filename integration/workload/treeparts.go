// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// thread keeps its tid and blocks a signal that it reads from a signalfd. One
// signal is always pending.
func (t *tree) thread() (func(int) error, error) {
	rounds, results := make(chan int), make(chan error)
	go func() {
		runtime.LockOSThread()
		tid := unix.Gettid()
		var mask unix.Sigset_t
		mask.Val[0] = 1 << (unix.SIGUSR2 - 1)
		if err := unix.PthreadSigmask(unix.SIG_BLOCK, &mask, nil); err != nil {
			results <- err
			return
		}
		fd, err := unix.Signalfd(-1, &mask, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK)
		results <- errors.Join(err, unix.Tgkill(os.Getpid(), tid, unix.SIGUSR2))
		for range rounds {
			if now := unix.Gettid(); now != tid {
				results <- fmt.Errorf("it is %d, not %d", now, tid)
				continue
			}
			var info unix.SignalfdSiginfo
			if _, err := unix.Read(fd, (*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[:]); err != nil {
				results <- fmt.Errorf("no signal: %w", err)
				continue
			}
			if info.Signo != uint32(unix.SIGUSR2) {
				results <- fmt.Errorf("signal %d", info.Signo)
				continue
			}
			results <- unix.Tgkill(os.Getpid(), tid, unix.SIGUSR2)
		}
	}()
	return func(n int) error {
		rounds <- n
		return <-results
	}, <-results
}

// deletedFile is an unlinked file; the number at its end changes in every
// round.
func (t *tree) deletedFile() (func(int) error, error) {
	f, err := os.CreateTemp(t.dir, "deleted")
	if err != nil {
		return nil, err
	}
	return func(n int) error {
		if err := binary.Write(f, binary.LittleEndian, uint64(n)); err != nil {
			return err
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if info.Size() != int64(8*n) {
			return fmt.Errorf("it has %d bytes", info.Size())
		}
		first := make([]byte, 8)
		if _, err := f.ReadAt(first, 0); err != nil {
			return err
		}
		if binary.LittleEndian.Uint64(first) != 1 {
			return fmt.Errorf("it begins with %x", first)
		}
		return nil
	}, os.Remove(f.Name())
}

// fileLock is a lock that nobody else can get.
func (t *tree) fileLock() (func(int) error, error) {
	path := filepath.Join(t.dir, "lock")
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	held := f // for as long as the check exists
	return func(int) error {
		again, err := os.Open(path)
		if err != nil {
			return err
		}
		defer again.Close()
		if err := unix.Flock(int(again.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			return errors.Join(fmt.Errorf("another process could take it although %s holds it", held.Name()), err)
		}
		return nil
	}, unix.Flock(int(f.Fd()), unix.LOCK_EX)
}

// hour is a time that never expires.
const hour = int64(time.Hour / time.Second)

// remaining checks that the rest of an hour decreases, by less than a
// checkpoint may take, and is not zero.
func remaining(last *int64, now, interval int64) error {
	if interval != hour || now > *last || now < *last-10*60 || now <= 0 {
		return fmt.Errorf("%d of %d seconds remain, %d did before", now, interval, *last)
	}
	*last = now
	return nil
}

func timerfd() (func(int) error, error) {
	long, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	quick, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	each := unix.ItimerSpec{Interval: unix.Timespec{Sec: hour}, Value: unix.Timespec{Sec: hour}}
	once := unix.ItimerSpec{Value: unix.NsecToTimespec((20 * time.Millisecond).Nanoseconds())}
	last := hour
	return func(int) error {
		var now unix.ItimerSpec
		if err := unix.TimerfdGettime(long, &now); err != nil {
			return err
		}
		if err := remaining(&last, now.Value.Sec, now.Interval.Sec); err != nil {
			return err
		}
		// Not a periodic one: CRIU takes an expired timer that was not read for
		// a disarmed one.
		if err := unix.TimerfdSettime(quick, 0, &once, nil); err != nil {
			return err
		}
		_, err := unix.Read(quick, make([]byte, 8)) // waits
		return err
	}, unix.TimerfdSettime(long, 0, &each, nil)
}

func posixTimer() (func(int) error, error) {
	event := struct {
		value  uint64
		signal int32
		notify int32
		rest   [48]byte
	}{notify: 1} // SIGEV_NONE
	var id int32
	if _, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&id))); errno != 0 {
		return nil, os.NewSyscallError("timer_create", errno)
	}
	spec := unix.ItimerSpec{Interval: unix.Timespec{Sec: hour}, Value: unix.Timespec{Sec: hour}}
	if _, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(id), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0); errno != 0 {
		return nil, os.NewSyscallError("timer_settime", errno)
	}
	last := hour
	return func(int) error {
		var now unix.ItimerSpec
		if _, _, errno := unix.Syscall(unix.SYS_TIMER_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&now)), 0); errno != 0 {
			return os.NewSyscallError("timer_gettime", errno)
		}
		return remaining(&last, now.Value.Sec, now.Interval.Sec)
	}, nil
}

func intervalTimer() (func(int) error, error) {
	_, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Interval: unix.Timeval{Sec: hour}, Value: unix.Timeval{Sec: hour}})
	last := hour
	return func(int) error {
		now, err := unix.Getitimer(unix.ITIMER_REAL)
		if err != nil {
			return err
		}
		return remaining(&last, now.Value.Sec, now.Interval.Sec)
	}, err
}

// eventfdAndEpoll keeps a count that grows by one in each round, and an epoll
// instance that has the eventfd registered with a number.
func eventfdAndEpoll() (func(int) error, error) {
	const mark = 4711
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return func(n int) error {
		if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, uint64(n))); err != nil {
			return err
		}
		events := make([]unix.EpollEvent, 2)
		if got, err := unix.EpollWait(poll, events, 0); err != nil || got != 1 || events[0].Fd != mark {
			return errors.Join(fmt.Errorf("epoll has %d events, the first of %d", got, events[0].Fd), err)
		}
		count := make([]byte, 8)
		if _, err := unix.Read(fd, count); err != nil {
			return err
		}
		// What the previous round left and what this one added.
		if have := binary.NativeEndian.Uint64(count); have != uint64(2*n-1) {
			return fmt.Errorf("the eventfd has %d, not %d", have, 2*n-1)
		}
		_, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, uint64(n)))
		return err
	}, unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: mark})
}

// inotify watches a directory in which every round creates a file.
func (t *tree) inotify() (func(int) error, error) {
	dir := t.watch
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	watch, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE)
	return func(n int) error {
		name := fmt.Sprintf("round-%d", n)
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Remove(path)); err != nil {
			return err
		}
		buffer := make([]byte, 4096)
		got, err := unix.Read(fd, buffer)
		if err != nil {
			return fmt.Errorf("no event: %w", err)
		}
		event := (*unix.InotifyEvent)(unsafe.Pointer(&buffer[0]))
		said := string(buffer[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+len(name)])
		if int(event.Wd) != watch || said != name || got != unix.SizeofInotifyEvent+int(event.Len) {
			return fmt.Errorf("%d bytes of events, of watch %d, of %q", got, event.Wd, said)
		}
		return nil
	}, err
}
