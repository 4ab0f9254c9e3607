# SPDX-License-Identifier: MIT OR Apache-2.0
"""What each role may ask of the operating system, entry by entry, with the reason.

An allow list: what is not named here kills the process, except for calls that well-meaning code makes in passing
(the traceback printer looks for a source file, libc looks for a locale); those get an errno, because killing a
kernel for printing would hand the host a switch. docs/isolation.md is rendered from these tables by
`python -m svsm.confine`, and a test holds the two together.

A rule may look at scalar arguments only: memory behind a pointer can change between check and use. So a path can
not be judged here; that is Landlock's part. A received descriptor escapes both (see docs/isolation.md).
"""

from __future__ import annotations

import dataclasses
import enum
import errno

__all__ = ["KILL", "ROLES", "Allow", "Condition", "Refuse", "Role", "Test", "allowed", "refused"]

KILL = -1
"""In place of an errno: the process dies with SIGSYS."""


class Role(enum.Enum):
    """A process of the running system, named for what it plays."""

    KERNEL = "kernel"
    SERVICE = "service"
    HARDWARE = "hardware"
    SPAWNER = "spawner"
    VCPU = "vcpu"
    HOST = "host"
    PROXY = "proxy"
    BROKER = "broker"
    DEVICE = "device"
    QEMU = "qemu"


class Test(enum.Enum):
    """How an argument is judged (its low 32 bits: the kernel takes an int for every argument that is tested)."""

    ONE_OF = "one of"
    CLEAR = "without"
    SET = "with"
    OWN_PROCESS = "own process"


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """A test of one argument; a call that fails it gets `otherwise` (an errno, or KILL)."""

    argument: int
    test: Test
    values: tuple[int, ...] = ()
    otherwise: int = KILL


@dataclasses.dataclass(frozen=True, slots=True)
class Allow:
    """System calls that a role may make, and why."""

    calls: tuple[str, ...]
    reason: str
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Refuse:
    """System calls answered with an errno instead of death, and why."""

    calls: tuple[str, ...]
    errno: int
    reason: str


def _calls(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_EXEC = 4  # PROT_EXEC
_CLONE_THREAD = 0x10000
_AT_EMPTY_PATH = 0x1000
_FCNTL = (0, 1, 2, 3, 4, 1030, 1033, 1034)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, ADD_SEALS, GET_SEALS
_LOCKS = (5, 6, 7, 36, 37, 38)  # GETLK, SETLK, SETLKW and their open-file-description kin
_IOCTL = (0x5421, 0x541B, 0x5450, 0x5451)  # FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
_DISK_IOCTL = (0x80081272, 0x1268, 0x127B, 0x125E, 0x1277, 0x127F)
# BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKROGET, BLKDISCARD, BLKZEROOUT
_PRCTL = (15, 16, 3, 0x53564D41)  # SET_NAME, GET_NAME, GET_DUMPABLE, SET_VMA (libc names its arenas)
_AF_UNIX = 1
_SOCKET_LEVELS = (1, 6)  # SOL_SOCKET, IPPROTO_TCP

_NO_EXEC = (
    Allow(
        _calls("mmap mprotect"),
        "memory; nothing becomes executable any more: all code is in place",
        Condition(2, Test.CLEAR, (_EXEC,), errno.EPERM),
    ),
)

_RUNTIME = (
    Allow(_calls("read write readv writev pread64 pwrite64 lseek close"), "descriptors it already holds"),
    Allow(_calls("fstat"), "what a held descriptor is"),
    Allow(
        _calls("newfstatat"),
        "libc's fstat(2) is newfstatat with AT_EMPTY_PATH",
        Condition(3, Test.SET, (_AT_EMPTY_PATH,), errno.EACCES),
    ),
    Allow(_calls("dup dup3 dup2"), "Python duplicates descriptors for file and socket objects"),
    Allow(
        _calls("fcntl"),
        "flags, duplication and seals of held descriptors; no owner, no signals, no leases",
        Condition(1, Test.ONE_OF, _FCNTL, errno.EPERM),
    ),
    Allow(
        _calls("ioctl"),
        "blocking mode, bytes waiting, close-on-exec; the terminal question of open() gets ENOTTY",
        Condition(1, Test.ONE_OF, _IOCTL, errno.ENOTTY),
    ),
    Allow(_calls("brk munmap mremap madvise"), "memory"),
    Allow(_calls("poll ppoll select pselect6"), "waiting for held descriptors, with deadlines"),
    Allow(_calls("epoll_create1 epoll_ctl epoll_wait epoll_pwait"), "waiting for held descriptors"),
    Allow(_calls("eventfd2 pipe2 pipe"), "waking its own threads"),
    Allow(_calls("clock_gettime clock_getres gettimeofday time"), "clocks (normally in the vDSO)"),
    Allow(_calls("clock_nanosleep nanosleep"), "sleeping"),
    Allow(_calls("getrandom"), "randomness"),
    Allow(_calls("futex sched_yield membarrier"), "locks between its own threads"),
    Allow(
        _calls("clone"),
        "threads only: a new process would need no CLONE_THREAD",
        Condition(0, Test.SET, (_CLONE_THREAD,)),
    ),
    Allow(_calls("set_robust_list rseq set_tid_address"), "the start of a thread"),
    Allow(
        _calls("tgkill kill"), "signals to itself: abort() and raise()", Condition(0, Test.OWN_PROCESS, (), errno.EPERM)
    ),
    Allow(_calls("rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall"), "its own signal handlers"),
    Allow(
        _calls("getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid"), "who it is; the parent check"
    ),
    Allow(_calls("getrusage times sysinfo sched_getaffinity uname"), "time, memory and processors used and present"),
    Allow(
        _calls("prlimit64"),
        "reading its own limits (thread stacks)",
        Condition(0, Test.OWN_PROCESS, (0,), errno.EPERM),
    ),
    Allow(_calls("prctl"), "names of threads and of libc's arenas", Condition(0, Test.ONE_OF, _PRCTL, errno.EPERM)),
    Allow(_calls("exit exit_group"), "ending"),
)

_MESSAGES = (
    Allow(_calls("sendmsg recvmsg sendto recvfrom"), "its channels, with descriptors where the protocol has them"),
    Allow(_calls("getsockopt getsockname getpeername shutdown"), "what kind of socket a descriptor is; ending it"),
    Allow(
        _calls("setsockopt"),
        "lingering and delays of client sockets; no filters of protocols below",
        Condition(1, Test.ONE_OF, _SOCKET_LEVELS, errno.EPERM),
    ),
)

_DISK = (
    Allow(_calls("fsync fdatasync"), "flushing the disk whose descriptor it was given"),
    Allow(_calls("preadv pwritev"), "vectored reads and writes of the disk"),
    Allow(_calls("flock"), "exclusive use of the disk"),
    Allow(_calls("fallocate ftruncate"), "zeroing, discarding and sizing; bounded by the descriptor's own rights"),
    Allow(
        _calls("ioctl"),
        "a block device: size, sectors, writability, discarding, zeroing",
        Condition(1, Test.ONE_OF, _DISK_IOCTL, errno.ENOTTY),
    ),
    Allow(_calls("fcntl"), "locks of the disk", Condition(1, Test.ONE_OF, _LOCKS, errno.EPERM)),
)

_LOOKING = (
    Allow(_calls("open openat"), "its own files; which, Landlock says"),
    Allow(_calls("stat lstat newfstatat statx access faccessat faccessat2"), "looking at its own files"),
    Allow(_calls("readlink readlinkat getcwd getdents64 statfs fstatfs fadvise64"), "looking at its own files"),
)

_FILES = (
    *_LOOKING,
    Allow(_calls("unlink unlinkat link rename renameat renameat2 mkdir mkdirat rmdir"), "changing its own folder"),
    Allow(_calls("fchmod fchown chmod fchmodat umask utimensat"), "modes of its own files and sockets"),
)

_NETWORK = (
    Allow(_calls("socket bind listen accept accept4 connect socketpair"), "serving and calling"),
    Allow(_calls("sendmmsg recvmmsg sendfile"), "name resolution and bulk transfer"),
    Allow(_calls("setsockopt"), "options of its sockets (IPv6 only, addresses in use)"),
)

_EXEC_MEMORY = (
    Allow(
        _calls("mmap mprotect"),
        "memory, executable too: the CPU emulator translates guest code at run time",
    ),
)

_START_PROCESSES = (
    Allow(_calls("mmap mprotect"), "the program that it starts maps its code under this same filter"),
    Allow(_calls("clone clone3 fork vfork execve wait4 waitid"), "starting kernel and services, and collecting them"),
    Allow(_calls("kill tgkill pidfd_open pidfd_send_signal"), "ending what it started"),
    Allow(_calls("memfd_create ftruncate sendfile copy_file_range"), "the loader's text and sealed copies"),
    Allow(_calls("arch_prctl prctl seccomp prlimit64 setrlimit getrlimit"), "the started program confines itself"),
    Allow(_calls("landlock_create_ruleset landlock_add_rule landlock_restrict_self"), "the same"),
    Allow(_calls("setresuid setresgid setgroups setuid setgid capget capset"), "each role gets its own uid"),
    Allow(_calls("getgroups setsid close_range socketpair"), "the start of a program"),
    Allow(_calls("fcntl ioctl"), "the start of a program: seals, terminal questions"),
)

_QEMU = (
    Allow(_calls("mmap mprotect"), "its own code and libraries, and the code that it translates the halted guest into"),
    Allow(_calls("execve arch_prctl"), "becoming QEMU; Landlock lets nothing else be started"),
    Allow(_calls("signalfd4 rt_sigtimedwait"), "its main loop takes signals as events"),
    Allow(_calls("get_mempolicy set_mempolicy mbind fchdir"), "what its libraries ask while they are loaded"),
    Allow(
        _calls("io_uring_setup"),
        "its main loop tries it first and does without",
        Condition(0, Test.ONE_OF, (0,), errno.ENOSYS),
    ),
    Allow(
        _calls("seccomp"),
        "a library asks what there is; nothing is added",
        Condition(0, Test.ONE_OF, (2,), errno.ENOSYS),
    ),
)

ROLES: dict[Role, tuple[Allow, ...]] = {
    Role.KERNEL: _RUNTIME + _NO_EXEC + _MESSAGES + _DISK,
    Role.SERVICE: _RUNTIME + _NO_EXEC + _MESSAGES,
    Role.HARDWARE: (
        *_RUNTIME,
        *_NO_EXEC,
        *_MESSAGES,
        Allow(_calls("fallocate"), "punching a page out of the memory it left"),
        Allow(_calls("memfd_create ftruncate"), "sealed copies of what the spawner shall start"),
        Allow(
            _calls("socketpair"),
            "the syscall socket of a service",
            Condition(0, Test.ONE_OF, (_AF_UNIX,)),
        ),
    ),
    # What it starts inherits its list, so theirs must be in it.
    Role.SPAWNER: _RUNTIME + _MESSAGES + _FILES + _DISK + _START_PROCESSES,
    Role.VCPU: _RUNTIME + _EXEC_MEMORY + _MESSAGES,
    Role.HOST: _RUNTIME + _NO_EXEC + _MESSAGES + _DISK + _FILES + _NETWORK,
    Role.DEVICE: _RUNTIME + _NO_EXEC + _MESSAGES + _DISK,
    Role.QEMU: _RUNTIME + _MESSAGES + _DISK + _LOOKING + _QEMU,
    Role.PROXY: _RUNTIME + _NO_EXEC + _MESSAGES + _FILES + _NETWORK,
    Role.BROKER: _RUNTIME + _NO_EXEC + _MESSAGES + _DISK + _FILES + _NETWORK,
}

_HARMLESS = (
    Refuse(_calls("clone3"), errno.ENOSYS, "its flags are behind a pointer; libc then falls back to clone"),
    Refuse(_calls("openat2 statx"), errno.ENOSYS, "libraries then fall back to the older call, which is judged"),
    Refuse(_calls("open openat creat"), errno.EACCES, "tracebacks look for source, libraries for configuration"),
    Refuse(_calls("stat lstat access faccessat faccessat2"), errno.EACCES, "the same"),
    Refuse(_calls("readlink readlinkat getcwd statfs"), errno.EACCES, "the same; libffi asks whether SELinux is there"),
    Refuse(_calls("sched_setaffinity memfd_create"), errno.EPERM, "libraries that can do without ask for it"),
)


def allowed(role: Role) -> dict[str, tuple[Allow, ...]]:
    """For each system call of the role: the entries that name it, in order; the first without condition decides."""
    table: dict[str, tuple[Allow, ...]] = {}
    for entry in ROLES[role]:
        for call in entry.calls:
            table[call] = (*table.get(call, ()), entry)
    return table


def refused(role: Role) -> dict[str, Refuse]:
    """The calls that answer the role with an errno, where no entry allows them."""
    mine = allowed(role)
    return {call: entry for entry in _HARMLESS for call in entry.calls if call not in mine}
