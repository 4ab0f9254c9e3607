# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every role, entered for real in a child process, tries what it may not: it dies, or gets an errno."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable

import pytest

from svsm.confine import Isolation, PathRule, Role, enter, libc
from svsm.confine import landlock as landlock_module
from svsm.confine.identity import role_uid
from svsm.confine.lists import allowed
from svsm.confine.syscalls import NUMBERS

DIED = f"died of {int(signal.SIGSYS)}"
SECRET_ROLES = (Role.KERNEL, Role.SERVICE)


def in_role(
    role: Role, action: Callable[[Isolation], object], *, rules: tuple[PathRule, ...] = (), cap: int | None = None
) -> str:
    """What `action` returned (as text) in a child that entered `role`, or how the child died."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            isolation = enter(role, uid=role_uid(role), landlock_rules=rules, parent=parent, landlock_cap=cap)
            os.write(writer, str(action(isolation)).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        text = answer.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text if code == 0 else f"died of {-code}"


def call(name: str, *arguments: int) -> Callable[[Isolation], object]:
    return lambda _: libc.syscall(NUMBERS[name], *arguments)


FATAL = [
    ("socket", (socket.AF_INET, socket.SOCK_STREAM, 0)),
    ("connect", (0, 0, 0)),
    ("bind", (0, 0, 0)),
    ("listen", (0, 1)),
    ("accept4", (0, 0, 0, 0)),
    ("execve", (0, 0, 0)),
    ("execveat", (0, 0, 0, 0, 0)),
    ("fork", ()),
    ("vfork", ()),
    ("clone", (signal.SIGCHLD, 0, 0, 0, 0)),
    ("ptrace", (16, 1, 0, 0)),
    ("process_vm_readv", (1, 0, 0, 0, 0, 0)),
    ("process_vm_writev", (1, 0, 0, 0, 0, 0)),
    ("pidfd_open", (1, 0)),
    ("pidfd_getfd", (0, 0, 0)),
    ("pidfd_send_signal", (0, 9, 0, 0)),
    ("tkill", (1, 9)),
    ("rt_sigqueueinfo", (1, 9, 0)),
    ("io_uring_setup", (1, 0)),
    ("socketpair", (socket.AF_UNIX, socket.SOCK_STREAM, 0, 0)),
    ("shmget", (0, 4096, 0o1600)),
    ("unshare", (0x10000000,)),
    ("setns", (0, 0)),
    ("mount", (0, 0, 0, 0, 0)),
    ("userfaultfd", (0,)),
    ("perf_event_open", (0, 0, 0, 0, 0)),
    ("bpf", (0, 0, 0)),
    ("keyctl", (0, 0)),
    ("personality", (0xFFFFFFFF,)),
    ("modify_ldt", (0, 0, 0)),
    ("seccomp", (0, 0, 0)),
    ("setresuid", (0, 0, 0)),
    ("unlink", (0,)),
    ("open_by_handle_at", (0, 0, 0)),
    ("pkey_mprotect", (0, 0, 0, 0)),
    ("memfd_secret", (0,)),
    ("copy_file_range", (0, 0, 1, 0, 1, 0)),
]


@pytest.mark.parametrize("role", SECRET_ROLES)
@pytest.mark.parametrize(("name", "arguments"), FATAL, ids=[name for name, _ in FATAL])
def test_roles_with_secrets_die(role: Role, name: str, arguments: tuple[int, ...]) -> None:
    assert in_role(role, call(name, *arguments)) == DIED


ERRNO = [
    ("open", (0, 0), errno.EACCES),
    ("openat", (-100, 0, 0), errno.EACCES),
    ("openat2", (-100, 0, 0, 0), errno.ENOSYS),
    ("newfstatat", (-100, 0, 0, 0), errno.EACCES),
    ("clone3", (0, 0), errno.ENOSYS),
    ("kill", (1, 0), errno.EPERM),
    ("kill", (0, 0), errno.EPERM),
    ("kill", (2**64 - 1, 0), errno.EPERM),
    ("tgkill", (1, 1, 0), errno.EPERM),
    ("mmap", (0, 4096, 5, 0x22, 2**64 - 1, 0), errno.EPERM),
    ("mprotect", (0, 4096, 4), errno.EPERM),
    ("fcntl", (0, 8, 1), errno.EPERM),
    ("ioctl", (0, 0x5412, 0), errno.ENOTTY),  # TIOCSTI: typing into somebody's terminal
    ("prctl", (4, 1, 0, 0, 0), errno.EPERM),  # PR_SET_DUMPABLE
    ("prlimit64", (1, 7, 0, 0), errno.EPERM),
    ("setsockopt", (0, 0, 64, 0, 0), errno.EPERM),  # SOL_IP, IPT_SO_SET_REPLACE
    ("memfd_create", (0, 0), errno.EPERM),
]


@pytest.mark.parametrize("role", SECRET_ROLES)
@pytest.mark.parametrize(
    ("name", "arguments", "expected"), ERRNO, ids=[f"{name}-{at}" for at, (name, _, _) in enumerate(ERRNO)]
)
def test_roles_with_secrets_get_an_errno(role: Role, name: str, arguments: tuple[int, ...], expected: int) -> None:
    assert in_role(role, call(name, *arguments)) == str(-expected)


@pytest.mark.parametrize("role", [role for role in Role if role not in (Role.SPAWNER, Role.QEMU)])
@pytest.mark.parametrize(
    "name", ["ptrace", "process_vm_readv", "io_uring_setup", "execve", "fork", "pidfd_getfd", "bpf"]
)
def test_no_role_but_the_spawner_starts_or_looks_into_processes(role: Role, name: str) -> None:
    assert name not in allowed(role)
    assert in_role(role, call(name, 0, 0, 0, 0, 0, 0)) == DIED


@pytest.mark.parametrize(
    "name", ["ptrace", "process_vm_readv", "fork", "vfork", "socket", "connect", "pidfd_open", "bpf"]
)
def test_what_qemu_has_no_use_for_kills_it(name: str) -> None:
    assert in_role(Role.QEMU, call(name, 0, 0, 0, 0, 0, 0)) == DIED


def test_qemu_does_without_io_uring_and_starts_nothing_that_landlock_does_not_name() -> None:
    assert in_role(Role.QEMU, call("io_uring_setup", 128, 0)) == str(-errno.ENOSYS)

    def start(_: Isolation) -> str:
        try:
            os.execv("/bin/true", ["true"])
        except PermissionError:
            return "refused"

    assert in_role(Role.QEMU, start, rules=(PathRule("/bin"), PathRule("/usr/bin"))) == "refused"


@pytest.mark.parametrize("role", list(Role))
def test_x32_calls_die(role: Role) -> None:
    assert in_role(role, lambda _: libc.syscall(0x4000_0000 | NUMBERS["getpid"])) == DIED


@pytest.mark.parametrize("role", list(Role))
def test_i386_calls_die(role: Role) -> None:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid) ; int 0x80 ; ret
    anchor = ctypes.c_char.from_buffer(code)
    getpid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(anchor))
    assert getpid() == os.getpid()
    assert in_role(role, lambda _: getpid()) == DIED


def test_what_a_kernel_needs_still_works() -> None:
    ours, theirs = socket.socketpair()

    def work(_: Isolation) -> str:
        done: list[int] = []
        thread = threading.Thread(target=lambda: done.append(os.getpid()))
        thread.start()
        thread.join()
        theirs.sendall(b"hello")
        peer = socket.socket(fileno=os.dup(theirs.fileno()))
        os.kill(os.getpid(), 0)
        return f"{done == [os.getpid()]} {peer.type == socket.SOCK_STREAM} {os.urandom(4) != b''}"

    with ours, theirs:
        assert in_role(Role.KERNEL, work) == "True True True"
        assert ours.recv(5) == b"hello"


def test_abort_is_a_signal_to_itself() -> None:
    def work(_: Isolation) -> None:
        faulthandler.disable()
        os.abort()

    assert in_role(Role.SERVICE, work) == f"died of {int(signal.SIGABRT)}"


@pytest.mark.parametrize("cap", [None, 2])
def test_landlock_leaves_the_broker_its_folder_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, cap: int | None
) -> None:
    mine = tmp_path_factory.mktemp("mine")
    other = tmp_path_factory.mktemp("other") / "file"
    other.write_text("not yours")
    uid = role_uid(Role.BROKER)
    # The way there must be open to another uid: pytest's own folders, of which a worker has one more.
    above = [folder for folder in mine.parents if folder.name.startswith(("pytest-", "popen-"))]
    for folder in (mine, other.parent, *above):
        folder.chmod(0o777)
    if uid is not None:
        os.chown(mine, uid, uid)

    def work(isolation: Isolation) -> str:
        (mine / "new").write_text("kept")
        (mine / "new").rename(mine / "renamed")
        try:
            other.read_text()
        except PermissionError:
            return f"{(mine / 'renamed').read_text()} {isolation.reduced} {isolation.landlock_abi}"
        return "read it"

    abi = min(landlock_module.abi(), cap or 99)
    assert in_role(Role.BROKER, work, rules=(PathRule(str(mine), write=True),), cap=cap) == f"kept () {abi}"


@pytest.mark.parametrize(("cap", "reduced"), [(0, "('landlock-absent',)"), (1, "('landlock-abi-1',)"), (2, "()")])
def test_reduced_isolation_is_reported(cap: int, reduced: str) -> None:
    assert in_role(Role.KERNEL, lambda isolation: isolation.reduced, cap=cap) == reduced


def test_a_received_descriptor_escapes_landlock() -> None:
    """Known, documented, and why every received descriptor is looked at: a deny-all process reads what it is handed."""
    with open("/etc/passwd", "rb") as handed:
        assert in_role(Role.KERNEL, lambda _: len(os.pread(handed.fileno(), 4, 0))) == "4"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a role its own uid")
def test_a_role_of_root_has_its_own_uid_and_no_way_back() -> None:
    expected = role_uid(Role.HARDWARE)
    assert in_role(Role.HARDWARE, lambda i: (os.getresuid(), os.getresgid(), i.own_uid)) == str(
        ((expected,) * 3, (expected,) * 3, True)
    )


def test_an_orphan_refuses_to_start() -> None:
    def orphan() -> str:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                enter(Role.KERNEL, parent=1)
            except BaseException as error:
                os.write(writer, str(getattr(error, "code", error)).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(writer)
        with open(reader, "rb") as answer:
            return answer.read().decode()

    assert orphan() == "confine-parent"


@pytest.mark.parametrize("uid", [None, role_uid(Role.PROXY)])
def test_a_role_dies_with_its_parent_also_after_the_drop(uid: int | None) -> None:
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        parent = os.getpid()
        if os.fork() == 0:
            enter(Role.PROXY, uid=uid, parent=parent)
            os.write(writer, b"x")
            while True:
                threading.Event().wait(60)
        threading.Event().wait(60)
    os.close(writer)
    with open(reader, "rb", buffering=0) as held:
        assert held.read(1) == b"x"
        os.kill(middle, signal.SIGKILL)
        os.waitpid(middle, 0)
        assert held.read(1) == b""  # the last writer is gone: the role died too
