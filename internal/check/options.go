// SPDX-License-Identifier: Apache-2.0

package check

import (
	"encoding/binary"
	"errors"
	"os"
	"syscall"
	"unsafe"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// errUnknown: an option cannot be tried here.
var errUnknown = errors.New("cannot be tried")

// tryOptions tries each of [KernelOptions] on the kernel that runs: by a call that
// fails in its own way without the option (Linux 6.12 and 6.18). It needs
// CAP_NET_ADMIN in its network namespace, in which it makes a table and removes
// it.
func tryOptions() (lacks, unknown []string) {
	for _, name := range KernelOptions {
		try := optionTries[name]
		if try == nil {
			unknown = append(unknown, name)
			continue
		}
		switch err := try(); {
		case isMissing(err):
			lacks = append(lacks, name)
		case errors.Is(err, errUnknown), errors.Is(err, unix.EPERM):
			unknown = append(unknown, name)
		}
	}
	return lacks, unknown
}

// isMissing reports whether a call failed because the kernel lacks what it asks
// for. Any other error is one about its arguments.
func isMissing(err error) bool {
	for _, missing := range []error{unix.ENOSYS, unix.ENOENT, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		if errors.Is(err, missing) {
			return true
		}
	}
	return false
}

var optionTries = map[string]func() error{
	"CHECKPOINT_RESTORE": func() error {
		var size uint32
		err := unix.Prctl(unix.PR_SET_MM, unix.PR_SET_MM_MAP_SIZE, uintptr(unsafe.Pointer(&size)), 0, 0)
		if err != nil { // without the option it is one of the operations that want CAP_SYS_RESOURCE
			return unix.ENOSYS
		}
		return nil
	},
	"UNIX_DIAG":     func() error { return sockDiag(unix.AF_UNIX, 0, 24) },
	"INET_DIAG":     func() error { return sockDiag(unix.AF_INET, unix.IPPROTO_TCP, 56) },
	"INET_TCP_DIAG": func() error { return sockDiag(unix.AF_INET, unix.IPPROTO_TCP, 56) },
	"INET_UDP_DIAG": func() error { return sockDiag(unix.AF_INET, unix.IPPROTO_UDP, 56) },
	"INET_RAW_DIAG": func() error { return sockDiag(unix.AF_INET, unix.IPPROTO_RAW, 56) },
	"NETLINK_DIAG":  func() error { return sockDiag(unix.AF_NETLINK, allProtocols, 20) },
	"PACKET_DIAG":   func() error { return sockDiag(unix.AF_PACKET, 0, 20) },

	"NAMESPACES": func() error { return exists("/proc/self/ns") },
	"TIME_NS":    func() error { return exists("/proc/self/ns/time") },
	"UTS_NS":     func() error { return exists("/proc/self/ns/uts") },
	"IPC_NS":     func() error { return exists("/proc/self/ns/ipc") },
	"PID_NS":     func() error { return exists("/proc/self/ns/pid") },
	"NET_NS":     func() error { return exists("/proc/self/ns/net") },

	"SYSVIPC": func() error { return call(unix.SYS_SHMCTL, none, unix.IPC_STAT, 0) },
	"POSIX_MQUEUE": func() error {
		name := [...]byte{'/', 0} // not a name: EINVAL or EACCES
		return call(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(&name)), 0, 0)
	},

	"EVENTFD":      func() error { return made(unix.Eventfd(0, unix.EFD_CLOEXEC)) },
	"SIGNALFD":     func() error { return made(unix.Signalfd(-1, new(unix.Sigset_t), unix.SFD_CLOEXEC)) },
	"TIMERFD":      func() error { return made(unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)) },
	"MEMFD_CREATE": func() error { return made(unix.MemfdCreate("", unix.MFD_CLOEXEC)) },
	"USERFAULTFD":  func() error { return call(unix.SYS_USERFAULTFD, none, 0, 0) },
	"AIO":          func() error { return call(unix.SYS_IO_SETUP, 0, 0, 0) },
	"FHANDLE":      func() error { return call(unix.SYS_NAME_TO_HANDLE_AT, none, 0, 0) },
	"RSEQ":         func() error { return call(unix.SYS_RSEQ, 0, 0, none) },

	"SECCOMP_FILTER": func() error {
		err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // with the option it wants a filter: EFAULT
			return unix.ENOSYS
		}
		return err
	},
	"PROC_PAGE_MONITOR": func() error { return exists("/proc/self/pagemap") },
	"MEM_SOFT_DIRTY":    softDirty,

	"NETFILTER":         netfilter,
	"NETFILTER_NETLINK": netfilter,
	"NF_TABLES":         func() error { return table(nftables.TableFamilyINet) },
	"NF_TABLES_INET":    func() error { return table(nftables.TableFamilyINet) },
	"NF_TABLES_IPV4":    func() error { return table(nftables.TableFamilyIPv4) },
	"NF_TABLES_IPV6":    func() error { return table(nftables.TableFamilyIPv6) },
}

const (
	// none is a descriptor or an ID that nothing has.
	none = ^uintptr(0)
	// allProtocols is NDIAG_PROTO_ALL of linux/netlink_diag.h.
	allProtocols = 0xff
	// sockDiagByFamily is SOCK_DIAG_BY_FAMILY of linux/sock_diag.h.
	sockDiagByFamily = 20
)

func call(number, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall6(number, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// made closes what a call has made.
func made(fd int, err error) error {
	if err == nil {
		unix.Close(fd)
	}
	return err
}

func exists(path string) error {
	_, err := os.Lstat(path)
	return err
}

// sockDiag requests a list of sockets; the size is that of the family's request,
// in bytes.
func sockDiag(family, protocol uint8, size int) error {
	c, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	request := make([]byte, size)
	request[0], request[1] = family, protocol
	_, err = c.Execute(netlink.Message{Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump}, Data: request})
	return err
}

func netfilter() error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	return c.Close()
}

// table makes an empty table of nftables and removes it.
func table(family nftables.TableFamily) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Name: "kata-checkpoint-check", Family: family})
	c.DelTable(t)
	err = c.Flush()
	if errors.Is(err, unix.EINVAL) { // there is no such subsystem of netfilter's
		return unix.ENOSYS
	}
	return err
}

// softDirty looks for the mark on a page that was just written
// (Documentation/admin-guide/mm/soft-dirty.rst).
func softDirty() error {
	const mark = 1 << 55
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return errUnknown
	}
	defer func() { _ = unix.Munmap(page) }()
	page[0] = 1
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return errUnknown
	}
	defer f.Close()
	var entry [8]byte
	at := int64(uintptr(unsafe.Pointer(&page[0]))) / int64(os.Getpagesize()) * int64(len(entry)) //nolint:gosec // an address of this process
	if _, err := f.ReadAt(entry[:], at); err != nil {
		return errUnknown
	}
	if binary.NativeEndian.Uint64(entry[:])&mark == 0 {
		return unix.ENOSYS
	}
	return nil
}
