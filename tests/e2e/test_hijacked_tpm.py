# SPDX-License-Identifier: MIT OR Apache-2.0
"""Code in the TPM process makes raw system calls, as a hijacked C library would: what it reaches, and who notices.

The image is built from a changed copy of the service (`tests.e2e.hijacked`) and its digest is enrolled: attestation is
no help here, the isolation has to hold. Done twice: as root, where every role has its own uid, and as nobody, where all
have the same one and only the lock-down of each process stands between them.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.broker.service import VAULT_KEY_NAME, Broker
from svsm.broker.vault import Vault
from svsm.cli.supervisor.demonstration import guest_random, guest_tpm_command
from svsm.confine import Role
from svsm.confine.identity import role_uid
from svsm.confine.syscalls import NUMBERS
from svsm.formats import tpm
from svsm.formats.swtpm import Control
from svsm.kernel.tpm import tpm_state_inode
from svsm.storage.cocoonfs.headers import read_static_header
from svsm.storage.cocoonfs.keys import Keys
from svsm.storage.drivers.memory import MemoryDevice
from tests.e2e.boot_support import is_alive
from tests.e2e.hijacked import (
    BAD_DESCRIPTORS,
    I386_GETPID,
    HijackedSystem,
    Pointer,
    role_of,
    smuggle,
    unprivileged_interpreter,
)
from tests.e2e.tpm_support import System, TpmClient, folder, nv_define, nv_write, pcr_extend, pcr_read

__all__ = ["folder"]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="looking into non-dumpable processes needs root"),
]

NV_INDEX = 0x150_0020
FAILURE = tpm.failure_response()
_X32 = 0x4000_0000
_MAX_DESCRIPTORS = 64
_PAGE = 4096


def running(*options: str, interpreter: str | None = None) -> Iterator[HijackedSystem]:
    system = HijackedSystem(*options, interpreter=interpreter)
    try:
        system.start()
        yield system
        assert system.stop() == 0
    finally:
        system.remove()


@pytest.fixture(scope="module")
def as_root() -> Iterator[HijackedSystem]:
    yield from running()


@pytest.fixture(scope="module")
def with_old_landlock() -> Iterator[HijackedSystem]:
    yield from running("--landlock-abi", "2")


@pytest.fixture(scope="module")
def as_nobody() -> Iterator[HijackedSystem]:
    yield from running(interpreter=unprivileged_interpreter())


_LONG = ("with_old_landlock", "as_nobody")


@pytest.fixture(params=["as_root", *(pytest.param(name, marks=pytest.mark.long) for name in _LONG)])
def system(request: pytest.FixtureRequest) -> HijackedSystem:
    made = request.getfixturevalue(request.param)
    assert isinstance(made, HijackedSystem)
    return made


@dataclasses.dataclass(frozen=True)
class Target:
    """Who is attacked."""

    kernel: int
    own: int
    other: int
    disk: str
    key: bytes


def volume_key(system: HijackedSystem) -> bytes:
    """The key of its volume, from its owner's vault."""
    folder = system.folder / "broker"  # a copy of ours, because the broker's own must be its user's
    shutil.copytree(system.state / "broker", folder)
    for entry in (folder, *folder.iterdir()):
        os.chown(entry, os.geteuid(), os.getegid())
    broker = Broker.open(folder)
    try:
        row = broker.volume(str(system.ready["volume_id"]))
        return Vault((folder / VAULT_KEY_NAME).read_bytes()).unwrap(row.wrapped_key, volume_id=row.volume_id)
    finally:
        broker.close()
        shutil.rmtree(folder)


def target(system: HijackedSystem) -> Target:
    pids = system.pids()
    (kernel,) = pids["kernel"]
    called = system.call(NUMBERS["getpid"])
    assert called is not None
    own = called[0]
    (other,) = set(pids["vtpm"]) - {own}
    disk = system.state / "host" / "disk.img"
    assert disk.stat().st_size == 8 << 20
    return Target(kernel, own, other, str(disk), volume_key(system))


def memory_of(pid: int) -> Iterator[bytes]:
    """What a process can read, mapping by mapping."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, _, _, _, *path = line.split(None, 5)
            low, high = (int(end, 16) for end in span.split("-"))
            if rights[0] != "r" or (path and (path[0].startswith("[v") or "svsm-" in path[0])):
                continue
            memory.seek(low)
            yield memory.read(high - low)


def others_are_well(system: HijackedSystem, aim: Target) -> None:
    """The kernel that was there still is, and the guest's TPM answers through it."""
    assert is_alive(aim.kernel)
    assert is_alive(aim.other)
    assert len(guest_random(system.state / "run" / "guest.sock")) == 8


def gone(pid: int, why: str) -> None:
    """The kernel ends it, soon."""
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, why
        time.sleep(0.01)


def refused_calls(aim: Target) -> dict[str, tuple[tuple[int | str | Pointer, ...], int]]:
    """Attempts that are answered with an errno: call and arguments, what must come back."""
    path = (aim.disk.encode() + b"\0").hex()
    memory, environ, descriptor = (f"/proc/{aim.kernel}/{name}\0".encode().hex() for name in ("mem", "environ", "fd/3"))
    here, exe = (-100) % 2**64, b"/proc/self/exe\0".hex()
    number = NUMBERS
    return {
        "open the disk": ((number["open"], path, os.O_RDWR), errno.EACCES),
        "open the disk, at": ((number["openat"], here, path, os.O_RDWR), errno.EACCES),
        "open the disk, only its name": ((number["openat"], here, path, os.O_PATH), errno.EACCES),
        "open the disk, newer": ((number["openat2"], here, path, bytes(24).hex(), 24), errno.ENOSYS),
        "look at the disk": ((number["newfstatat"], here, path, bytes(144).hex(), 0), errno.EACCES),
        "the kernel's memory": ((number["open"], memory, os.O_RDWR), errno.EACCES),
        "the kernel's environment": ((number["openat"], here, environ, 0), errno.EACCES),
        "the kernel's descriptor": ((number["openat"], here, descriptor, os.O_RDWR), errno.EACCES),
        "where that leads": ((number["readlink"], descriptor, bytes(64).hex(), 64), errno.EACCES),
        "its own program": ((number["openat"], here, exe, 0), errno.EACCES),
        "signal the kernel": ((number["kill"], aim.kernel, signal.SIGKILL), errno.EPERM),
        "stop the kernel's thread": ((number["tgkill"], aim.kernel, aim.kernel, signal.SIGSTOP), errno.EPERM),
        "signal everybody": ((number["kill"], (-1) % 2**64, signal.SIGKILL), errno.EPERM),
        "signal the group": ((number["kill"], 0, signal.SIGKILL), errno.EPERM),
        "the kernel's limits": ((number["prlimit64"], aim.kernel, 4, Pointer([0, 0]), 0), errno.EPERM),
        "the kernel's processors": ((number["sched_setaffinity"], aim.kernel, 8, Pointer([1])), errno.EPERM),
        "be dumpable": ((number["prctl"], 4, 1, 0, 0, 0), errno.EPERM),
        "let others trace it": ((number["prctl"], 0x59616D61, (-1) % 2**64, 0, 0, 0), errno.EPERM),
        "a memfd": ((number["memfd_create"], b"code\0".hex(), 0), errno.EPERM),
        "executable memory": ((number["mmap"], 0, _PAGE, 5, 0x22, (-1) % 2**64, 0), errno.EPERM),
        "memory that becomes executable": ((number["mprotect"], 0, _PAGE, 5), errno.EPERM),
        "a signal when a socket moves": ((number["fcntl"], 0, 8, aim.kernel), errno.EPERM),
        "type into a terminal": ((number["ioctl"], 0, 0x5412, b"x".hex()), errno.ENOTTY),
        "a process, the new way": ((number["clone3"], bytes(88).hex(), 88), errno.ENOSYS),
    }


FATAL: dict[str, tuple[int | str | Pointer, ...]] = {
    "ptrace the kernel": (NUMBERS["ptrace"], 0x4206, -1, 0, 0),
    "a socket": (NUMBERS["socket"], socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "a call by the 32-bit entry": (I386_GETPID,),
    "a process": (NUMBERS["fork"],),
    "the kernel's memory": (
        NUMBERS["process_vm_readv"],
        -1,
        Pointer([Pointer([0]), 8]),
        1,
        Pointer([0x400000, 8]),
        1,
        0,
    ),
    "write the kernel's memory": (NUMBERS["process_vm_writev"], -1, 0, 0, 0, 0, 0),
    "a handle of the kernel": (NUMBERS["pidfd_open"], -1, 0),
    "its descriptor": (NUMBERS["pidfd_getfd"], 3, 3, 0),
    "another program": (NUMBERS["execve"], b"/bin/sh\0".hex(), Pointer([0]), Pointer([0])),
    "connect": (NUMBERS["connect"], 0, (b"\1\0/run/any\0").hex(), 11),
    "an x32 call": (_X32 | NUMBERS["getpid"],),
    "a queued signal": (NUMBERS["rt_sigqueueinfo"], -1, signal.SIGKILL, bytes(128).hex()),
    "a process, by clone": (NUMBERS["clone"], int(signal.SIGCHLD), 0, 0, 0, 0),
    "another uid": (NUMBERS["setresuid"], 0, 0, 0),
    "a ring of calls": (NUMBERS["io_uring_setup"], 1, bytes(120).hex()),
    "memory that waits": (NUMBERS["userfaultfd"], 1),
}
"""Attempts that end the process; -1 stands for the kernel's process id."""


def test_every_role_has_its_own_uid_where_root_starts_it(as_root: HijackedSystem) -> None:
    aim = target(as_root)
    uids = [os.stat(f"/proc/{pid}").st_uid for pid in (aim.kernel, aim.own, aim.other)]
    status = [Path(f"/proc/{pid}/status").read_text() for pid in (aim.kernel, aim.own, aim.other)]
    real = [int(text.split("Uid:")[1].split()[0]) for text in status]
    assert real == [role_uid(Role.KERNEL), role_uid(Role.SERVICE, 0), role_uid(Role.SERVICE, 1)]
    assert set(uids) <= {0, *real}  # the files of a process that is not dumpable belong to root


@pytest.mark.long
def test_all_have_one_uid_where_nobody_starts_it(as_nobody: HijackedSystem) -> None:
    pids = as_nobody.processes()
    real = [int(Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0]) for pid in pids]
    assert set(real) == {65534}
    assert as_nobody.ready["isolation"]["reduced"] == []


def test_it_can_call_and_what_it_may_not_is_refused(system: HijackedSystem) -> None:
    aim = target(system)
    for name, (arguments, expected) in refused_calls(aim).items():
        number, *rest = arguments
        assert isinstance(number, int)
        answer = system.call(number, *rest)
        assert answer is not None, f"it died of: {name}"
        assert answer[0] == -expected, name
    assert system.call(NUMBERS["getpid"]) == (aim.own, [])  # the same process all the time
    others_are_well(system, aim)


def test_its_descriptors_lead_to_its_own_image_and_nowhere_else(system: HijackedSystem) -> None:
    """It reads and writes every number that it could hold: two sealed files with measured code, and its sockets."""
    aim = target(system)
    held = {int(name): os.readlink(f"/proc/{aim.own}/fd/{name}") for name in os.listdir(f"/proc/{aim.own}/fd")}
    assert max(held) < _MAX_DESCRIPTORS
    readable = {}
    for number in range(_MAX_DESCRIPTORS):
        read = system.call(NUMBERS["pread64"], number, bytes(1024).hex(), 1024, 0)
        wrote = system.call(NUMBERS["pwrite64"], number, bytes(8).hex(), 8, 0)
        grown = system.call(NUMBERS["fcntl"], number, 1033, 0)  # F_ADD_SEALS: not even that
        assert read is not None
        assert wrote is not None
        assert grown is not None
        if read[0] > 0:
            readable[number] = read[1][0]
        assert wrote[0] < 0 or held[number] == "/dev/null", number
        assert grown[0] < 0, number
    assert sorted(held[number] for number in readable) == [
        "/memfd:loader (deleted)",
        "/memfd:payload:archive (deleted)",
    ]
    assert sorted(data[:4] for data in readable.values()) == [b"# SP", b"PK\3\4"]
    # Its socket to the kernel cannot be turned towards somebody else.
    address = (b"\1\0" + str(system.state / "run" / "serial.sock").encode() + b"\0").hex()
    for number, kind in held.items():
        if kind.startswith("socket:"):
            sent = system.call(NUMBERS["sendto"], number, b"".hex(), 0, 0, address, len(address) // 2)
            assert sent is not None
            assert sent[0] in (-errno.EISCONN, -errno.EOPNOTSUPP)


def test_no_key_is_in_any_memory_but_the_kernels(system: HijackedSystem) -> None:
    """The key and what the kernel derives from it, looked for in everything that a process can read."""
    aim = target(system)
    header = read_static_header(MemoryDevice(Path(aim.disk).read_bytes()))
    keys = Keys(aim.key, header)
    secrets = [aim.key, keys._root, *(keys.encryption_key(tpm_state_inode(number)) for number in range(2))]

    def found_in(pid: int) -> set[int]:
        return {at for piece in memory_of(pid) for at, secret in enumerate(secrets) if secret in piece}

    assert 1 in found_in(aim.kernel)  # the search finds what is there
    (hardware,) = (pid for pid in system.processes() if aim.kernel in grandchildren(pid))
    for pid in set(system.processes()) - {aim.kernel, hardware}:  # hardware is the processor: it holds all memory
        assert found_in(pid) == set(), pid


def grandchildren(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(below) for child in children for below in Path(f"/proc/{child}/task/{child}/children").read_text().split()
    ]


def reset(system: HijackedSystem) -> None:
    """CMD_INIT on the control socket, then the TPM2_Startup that firmware would send."""
    with TpmClient(system.where.with_name(system.where.name + ".ctrl")) as control:
        assert control.exchange(Control.INIT.to_bytes(4, "big") + bytes(4), 4) == bytes(4)
    with TpmClient(system.where) as client:
        client.run(tpm.startup())


def attempt_fatal(system: HijackedSystem, names: list[str]) -> None:
    """Each attempt ends the process and nothing else; its successor answers failure until its guest resets."""
    aim = target(system)
    value = os.urandom(16)
    with TpmClient(system.where) as client:
        assert len(client.run(tpm.get_random(8))) == 20
        client.run(nv_define(NV_INDEX, len(value)))
        client.run(nv_write(NV_INDEX, value))
    ended = set()
    for name in names:
        own = target(system).own
        number, *rest = FATAL[name]
        assert isinstance(number, int)
        assert own not in ended
        assert system.call(number, *(aim.kernel if word == -1 else word for word in rest)) is None, name
        ended.add(own)
        gone(own, name)
        others_are_well(system, aim)
        with TpmClient(system.where) as client:  # waits for the successor
            assert client.ask(tpm.get_random(8)) == FAILURE
            assert client.ask(tpm.startup()) == FAILURE
        assert role_of(target(system).own) == "vtpm"
    reset(system)
    with TpmClient(system.where) as client:
        assert len(client.run(tpm.get_random(8))) == 20
        assert client.read_index(NV_INDEX, len(value)) == value
        _, public = tpm.parse_create_primary(client.run(tpm.create_ek()))
        assert tpm.ek_name(public).hex() == system.ready["ek_name"]
    others_are_well(system, aim)


def test_some_attempts_end_it_and_only_it(as_root: HijackedSystem) -> None:
    attempt_fatal(as_root, list(FATAL)[:3])


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_all_attempts_end_it_and_only_it(user: str) -> None:
    interpreter = unprivileged_interpreter() if user == "nobody" else None
    names = list(FATAL)
    for first in range(0, len(names), 6):  # each start after a crash waits twice as long
        for system in running(interpreter=interpreter):
            attempt_fatal(system, names[first : first + 6])


def test_descriptors_that_it_sends_to_the_kernel_go_nowhere(as_root: HijackedSystem) -> None:
    aim = target(as_root)
    environment = Path(f"/proc/{aim.own}/environ").read_bytes().decode().split("\0")
    (named,) = (entry for entry in environment if entry.startswith("SVSM_DESCRIPTORS="))
    numbers = dict(pair.split("=") for pair in named.partition("=")[2].split(","))
    before = held_by(aim.kernel)
    sent = [0] * 200
    control = (16 + 4 * len(sent)).to_bytes(8, "little") + bytes.fromhex("0100000001000000") + bytes(4 * len(sent))
    nothing_of_a_call = Pointer([bytes(16).hex(), 16])
    message = Pointer([0, 0, nothing_of_a_call, 1, control.hex(), len(control), 0])
    as_root.call(NUMBERS["sendmsg"], int(numbers["syscall"]), message, 0)
    gone(aim.own, "the bytes beside them are no call")
    others_are_well(as_root, aim)
    reset(as_root)
    holds_again({aim.kernel: before})


def held_by(pid: int) -> list[str]:
    """What a process holds, sockets and pipes only by kind."""
    return sorted(re.sub(r":\[\d+\]", "", os.readlink(entry)) for entry in Path(f"/proc/{pid}/fd").iterdir())


def holds_again(before: dict[int, list[str]]) -> None:
    """Connections that are closed elsewhere are closed here too, soon; then everything is as it was."""
    deadline = time.monotonic() + 20
    while (now := {pid: held_by(pid) for pid in before}) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == before


def test_what_the_host_hands_over_must_be_a_client(as_root: HijackedSystem) -> None:
    aim = target(as_root)
    before = {pid: held_by(pid) for pid in (aim.kernel, aim.own)}
    smuggle(str(as_root.ready["tcti_tcp"]))
    deadline = time.monotonic() + 10
    as_root.instance.wait_for("client-refused", code="client-front", seconds=10)  # the last but those at once
    while True:
        refused = [event["code"] for event in as_root.instance.events if event["event"] == "client-refused"]
        if len(refused) > BAD_DESCRIPTORS:
            break
        assert time.monotonic() < deadline, refused
    assert sorted(refused) == ["client-descriptor"] * BAD_DESCRIPTORS + ["client-front"]
    with TpmClient(as_root.where) as client:
        client.ask(tpm.get_random(8))
    holds_again(before)
    others_are_well(as_root, aim)


def guest_asks(system: System, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as driver:
        driver.settimeout(30)
        driver.connect(str(system.state / "run" / "guest.sock"))
        return guest_tpm_command(driver, command)


def test_the_guests_tpm_dies_alone_and_answers_failure_to_this_guest(folder: Path) -> None:
    system = System(folder)
    try:
        first = system.start()
        (service,) = (
            pid
            for pid in system.processes()
            if f"Uid:\t{role_uid(Role.SERVICE, 1)}\t" in Path(f"/proc/{pid}/status").read_text()
        )
        extend, extended = pcr_extend(16, b"\7" * 32), hashlib.sha256(bytes(32) + b"\7" * 32).digest()
        assert tpm.response_code(guest_asks(system, extend)) == 0
        assert guest_asks(system, pcr_read(16))[-32:] == extended
        os.kill(service, signal.SIGKILL)
        for command in (pcr_read(16), tpm.startup(), tpm.get_random(8), extend):
            assert guest_asks(system, command) == FAILURE
        with TpmClient(system.where) as client:
            assert len(client.run(tpm.get_random(8))) == 20
        assert system.stop() == 0
        again = system.start()  # a new guest: the same TPM, its PCRs anew
        assert (again["ek_name"], again["guest_ek_name"]) == (first["ek_name"], first["guest_ek_name"])
        assert guest_asks(system, pcr_read(16))[-32:] == bytes(32)
        assert system.stop() == 0
    finally:
        system.close()
