# SPDX-License-Identifier: MIT OR Apache-2.0
"""A running system, looked at from outside by root: who holds which memory, files and code, under which uid."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from svsm.confine import Role
from svsm.confine.identity import role_uid
from svsm.formats import tpm
from svsm.launch.payload import build_payload
from tests.e2e.boot_support import Instance, gone_within_a_second, is_alive
from tests.e2e.descriptors import COLUMNS, Table, Unit, count_descriptors, design_table, mapped_memories
from tests.support import peer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="looking into non-dumpable processes needs root"),
]

EVERY_ROLE: set[Role | None] = {*Role, None}
"""None is the supervisor."""

QUIET_SECONDS = 5.0
"""The last of the boot's own connections may still be closing when it says that it is ready."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One process of the system."""

    pid: int
    role: Role | None
    uid: int
    status: dict[str, str]
    descriptors: tuple[str, ...]
    executable: tuple[str, ...]

    @property
    def unit(self) -> Unit:
        """The process and its column in DESIGN's tables."""
        names = {None: "supervisor", Role.SERVICE: "vtpm"}
        return Unit(self.pid, names.get(self.role) or str(self.role and self.role.value))


def see(pid: int, parent_role: Role | None, *, top: bool) -> Seen:
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
    uid = int(status["Uid"].split()[0])
    roles = {role_uid(role, number): role for role in Role for number in range(4)}
    role = None if top else roles.get(uid)
    if role is None and parent_role is Role.HARDWARE:
        role = Role.SPAWNER
    rows = [line.split(None, 5) for line in (folder / "maps").read_text().splitlines()]
    return Seen(
        pid,
        role,
        uid,
        status,
        tuple(os.readlink(entry) for entry in (folder / "fd").iterdir()),
        tuple(sorted({row[5] if len(row) > 5 else "" for row in rows if "x" in row[1]})),
    )


def family(pid: int, parent_role: Role | None = None, *, top: bool = True) -> list[Seen]:
    mine = see(pid, parent_role, top=top)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [mine, *(seen for child in children for seen in family(int(child), mine.role, top=False))]


def boot(state: Path, *options: str, wrap: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    command = [*wrap, sys.executable, "-m", "svsm.cli.main", "boot", "--state", str(state), "--json", *options]
    with open(state.parent / "out", "wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and started.poll() is None:
        lines = (state.parent / "out").read_bytes().splitlines()
        if any(b'"event": "ready"' in line for line in lines):
            return started
        time.sleep(0.02)
    started.kill()
    started.wait()
    raise AssertionError((state.parent / "out").read_text())


def ready(folder: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    found: dict[str, Any] = next(event for event in events if event["event"] == "ready")
    return found


@pytest.fixture(scope="module", params=[None, pytest.param("2", marks=pytest.mark.long)], ids=["", "landlock-2"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Seen]]:
    """A running system; once more with Landlock as Debian 12's own kernel has it."""
    options = () if request.param is None else ("--landlock-abi", request.param)
    folder = tmp_path_factory.mktemp("boot")
    started = boot(folder / "state", *options)
    assert ready(folder)["isolation"] == {"reduced": []}
    yield family(started.pid)
    started.send_signal(signal.SIGINT)
    started.wait(20)


def test_every_role_is_there(system: list[Seen]) -> None:
    roles = [seen.role for seen in system]
    # Without the emulator there is no vCPU, and only a disk of QEMU's has a QEMU.
    assert EVERY_ROLE - set(roles) <= {Role.VCPU, Role.QEMU}
    assert Role.QEMU not in roles
    assert roles.count(Role.SERVICE) == 2
    assert roles.count(None) == roles.count(Role.KERNEL) == roles.count(Role.SPAWNER) == 1


def test_each_role_has_its_own_uid_and_is_confined(system: list[Seen]) -> None:
    roles = [seen for seen in system if seen.role is not None]
    own = [seen.uid for seen in roles if seen.role is not Role.SPAWNER]
    assert len(set(own)) == len(own)
    assert all(uid >> 16 == 0x5356 for uid in own)
    for seen in roles:
        assert seen.status["Seccomp"] == "2", seen.role
        assert seen.status["NoNewPrivs"] == "1", seen.role
        if seen.role is not Role.SPAWNER:
            assert int(seen.status["CapEff"], 16) == int(seen.status["CapPrm"], 16) == 0, seen.role
            assert seen.status["Groups"].split() == [], seen.role


Differences = dict[str, tuple[dict[str, int], dict[str, int]]]
"""Column → (what such a process holds and should not, what it should hold and does not)."""


def differences(system: list[Seen], table: Table) -> Differences:
    units = [seen.unit for seen in system]
    counted = count_descriptors(units)
    found = {}
    for unit in units:
        wanted = collections.Counter(table.column(unit.column))
        if (held := counted[unit.pid]) != wanted:
            found[unit.column] = (dict(held - wanted), dict(wanted - held))
    return found


def settled(system: list[Seen], table: Table, expected: Differences) -> Differences:
    """The differences, once they are the expected ones; otherwise those that stay."""
    deadline = time.monotonic() + QUIET_SECONDS
    while (found := differences(system, table)) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def whole(system: list[Seen]) -> list[Seen]:
    if Role.VCPU not in {seen.role for seen in system}:
        pytest.skip("the tables are for a machine that runs a guest: unicorn is missing")
    return system


def test_every_descriptor_is_in_the_table_of_the_design(system: list[Seen]) -> None:
    assert settled(whole(system), design_table("descriptor"), {}) == {}


def test_every_mapped_memory_is_in_the_table_of_the_design(system: list[Seen]) -> None:
    table = design_table("mapping")
    for seen in whole(system):
        assert mapped_memories(seen.pid) == set(table.column(seen.unit.column)), seen.role


def test_a_clients_connection_is_its_tpms_alone(system: list[Seen]) -> None:
    table = design_table("descriptor")
    assert table.passing["TPM client", "vtpm"] == "per client"
    words = Path(f"/proc/{system[0].pid}/cmdline").read_bytes().split(b"\0")
    state = Path(words[words.index(b"--state") + 1].decode())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(state / "run" / "vtpm0.sock"))
        client.sendall(tpm.get_random(8))
        assert len(client.recv(4096)) == 20
        expected: Differences = {"vtpm": ({"TPM client": 1}, {})}
        assert settled(whole(system), table, expected) == expected
    assert settled(system, table, {}) == {}


@pytest.mark.long
def test_while_it_attests_the_kernel_alone_holds_the_serial_line(place: Path) -> None:
    """A proxy that says nothing: the kernel waits, and everybody holds at most what the table says."""
    table = design_table("descriptor")
    assert table.passing["serial line, connected", "kernel"] == "while attesting"
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (place / "key.pem").write_bytes(pem)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as proxy:
        proxy.bind(str(place / "serial.sock"))
        proxy.listen()
        words = ("--serial", str(place / "serial.sock"), "--broker-key", str(place / "key.pem"))
        with Instance(place / "state", *words) as instance:
            proxy.settimeout(60)
            line, _ = proxy.accept()
            with line:
                line.settimeout(20)
                assert line.recv(4096)  # the kernel's first frame
                units = [seen.unit for seen in family(instance.process.pid)]
                counted = count_descriptors(units)
    for unit in units:
        held = dict(counted[unit.pid])
        assert held.pop("serial line, connected", 0) == (unit.column == "kernel"), unit.column
        more = collections.Counter(held) - collections.Counter(table.column(unit.column))
        if unit.column == "supervisor":
            more = collections.Counter({name: count for name, count in more.items() if not _is_output(name)})
        if unit.column == "hardware":
            more["event pipe"] -= 1  # the service console, into which no service writes yet
        assert +more == {}, unit.column


def _is_output(name: str) -> bool:
    """What the test gave the supervisor for its output."""
    return name.startswith("/tmp/") or name == "pipe supervisor → test"


def test_a_forgotten_end_of_a_channel_has_no_row() -> None:
    rows = set(design_table("descriptor").quiet)
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as running:

        def holder(end: socket.socket, column: str) -> Unit:
            process = running.enter_context(subprocess.Popen(["sleep", "60"], pass_fds=[end.fileno()]))
            running.callback(process.kill)
            return Unit(process.pid, column)

        kernel, hardware, host = holder(left, "kernel"), holder(right, "hardware"), holder(right, "host")
        left.close()
        right.close()
        assert count_descriptors([kernel, hardware])[kernel.pid]["hardware ↔ kernel"] == 1
        leaked = count_descriptors([kernel, hardware, host])
        for unit in (kernel, hardware, host):
            strange = [name for name in leaked[unit.pid] if name not in rows and "seqpacket" in name]
            assert len(strange) == 1, leaked[unit.pid]
            assert "host" in strange[0]


def test_a_table_that_is_no_table_is_refused() -> None:
    head = "| descriptor | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS) + "\n"
    assert design_table("descriptor", head + "| x |" + " 1 |" * len(COLUMNS)).column("vcpu") == {"x": 1}
    for row in ("| x |" + " ● |" * len(COLUMNS), "| x | 1 |", ("| x |" + " 1 |" * len(COLUMNS) + "\n") * 2):
        with pytest.raises(AssertionError):
            design_table("descriptor", head + row)


def test_kernel_and_services_run_measured_code_only(system: list[Seen]) -> None:
    manifest = build_payload().manifest
    listed = {*manifest.libraries.values(), *(item.sha256 for item in manifest.extensions.values())}
    for seen in system:
        if seen.role in (Role.KERNEL, Role.SERVICE):
            loads = {load.name for load in manifest.roles[seen.unit.column].loads}
            objects = {f"/memfd:payload:{name} (deleted)" for name in {*loads, "native/callback-slots"}}
            assert {path for path in seen.executable if path.startswith("/memfd:")} == objects, seen.role
            for path in {*seen.executable} - objects - {"[vdso]", "[vsyscall]"}:
                assert path, f"{seen.role}: executable memory without a file"
                assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in {*listed, manifest.interpreter}, path


def test_forks_run_the_supervisors_code_and_the_emulator_its_own_besides(system: list[Seen]) -> None:
    (supervisor,) = (set(seen.executable) for seen in system if seen.role is None)
    assert [path for path in supervisor - {"[vdso]", "[vsyscall]"} if not re.match(r"/(?!memfd:)", path)] == []
    for seen in system:
        more = set(seen.executable) - supervisor
        if seen.role is Role.VCPU:
            assert all(path == "" or "unicorn" in path for path in more), more
        elif seen.role not in (Role.KERNEL, Role.SERVICE):
            assert more == set(), seen.role


def test_no_role_lets_itself_be_looked_into(system: list[Seen]) -> None:
    """The files below /proc/PID of a process that is not dumpable belong to root, whatever its uid."""
    for seen in system:
        if seen.role is not None:
            assert os.stat(f"/proc/{seen.pid}/environ").st_uid == 0, seen.role
            assert seen.role is Role.SPAWNER or seen.uid != 0, seen.role


def test_only_the_emulator_has_writable_code(system: list[Seen]) -> None:
    for seen in system:
        rows = [line.split(None, 5) for line in Path(f"/proc/{seen.pid}/maps").read_text().splitlines()]
        if seen.role in (Role.KERNEL, Role.SERVICE):
            assert [row for row in rows if "w" in row[1] and "x" in row[1]] == [], seen.role


def test_another_role_cannot_look_into_kernel_and_hardware(system: list[Seen]) -> None:
    targets = [seen.pid for seen in system if seen.role in (Role.KERNEL, Role.HARDWARE)]
    host = next(seen.uid for seen in system if seen.role is Role.HOST)
    script = (
        "import os, sys\n"
        "for pid in sys.argv[1:]:\n"
        "    for name in ('mem', 'maps', 'fd', 'environ'):\n"
        "        path = f'/proc/{pid}/{name}'\n"
        "        try: os.listdir(path) if name == 'fd' else open(path, 'rb').read(1)\n"
        "        except PermissionError: continue\n"
        "        print('opened', path)\n"
        "    try: os.kill(int(pid), 0)\n"
        "    except PermissionError: continue\n"
        "    print('signalled', pid)\n"
    )
    # The distribution's interpreter: ours may lie in a folder that another uid can't enter.
    done = subprocess.run(
        ["/usr/bin/python3", "-S", "-c", script, *map(str, targets)],
        user=host,
        group=host,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_chips_key_is_in_the_memory_of_hardware_only(system: list[Seen]) -> None:
    """Roles are forks: what the supervisor has ever read, a hijacked host would find in its own memory."""
    words = Path(f"/proc/{system[0].pid}/cmdline").read_bytes().split(b"\0")
    folder = Path(words[words.index(b"--state") + 1].decode()) / "machine"
    needles: list[bytes] = []
    for name in ("vcek", "ask", "ark"):
        text = (folder / f"{name}.key.pem").read_bytes()
        numbers = load_pem_private_key(text, None).private_numbers()  # type: ignore[union-attr]
        number = numbers.private_value if name == "vcek" else numbers.p  # type: ignore[union-attr]
        width = (number.bit_length() + 7) // 8
        # A line with private numbers only: the public ones travel in certificates, in base64 too.
        line = text.splitlines()[1 if name == "vcek" else -6]
        needles += [line, number.to_bytes(width, "big"), number.to_bytes(width, "little")]
    memories = ((seen.role, _memory(seen.pid)) for seen in system)
    holders = {role for role, memory in memories if any(needle in memory for needle in needles)}
    assert holders == {Role.HARDWARE}


def test_a_hijacked_service_does_not_speak_for_the_kernel(system: list[Seen]) -> None:
    service = next(seen for seen in system if seen.role is Role.SERVICE)
    pipes = [entry for entry in Path(f"/proc/{service.pid}/fd").iterdir() if os.readlink(entry).startswith("pipe:")]
    assert pipes
    kernel = next(seen for seen in system if seen.role is Role.KERNEL)
    assert {os.readlink(entry) for entry in pipes}.isdisjoint(kernel.descriptors)
    for entry in pipes:
        descriptor = os.open(entry, os.O_WRONLY | os.O_NONBLOCK)
        os.write(descriptor, b'{"event":"failed","code":"forged","message":"gone"}\n{"event":"ready","tpms":[]}\n')
        os.close(descriptor)
    printed = Path(f"/proc/{system[0].pid}/fd/1")  # the supervisor remarks on it, and does no more
    deadline = time.monotonic() + 20
    while '"text": "a service says that it failed: forged"' not in printed.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert all(is_alive(seen.pid) for seen in system)


def _memory(pid: int) -> bytes:
    """What a process holds in writable memory of its own."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for row in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = row.split()
            if rights.startswith("rw-p"):
                first, last = (int(word, 16) for word in place.split("-"))
                memory.seek(first)
                found.append(memory.read(last - first))
    return b"\n".join(found)


@pytest.mark.long
def test_an_older_landlock_is_reported(tmp_path: Path) -> None:
    started = boot(tmp_path / "state", "--landlock-abi", "1")
    started.send_signal(signal.SIGINT)
    started.wait(20)
    assert ready(tmp_path)["isolation"] == {"reduced": ["landlock-abi-1"]}


def test_a_killed_supervisor_takes_everything_with_it(tmp_path: Path) -> None:
    started = boot(tmp_path / "state", "--landlock-abi", "2")
    pids = [seen.pid for seen in family(started.pid)]
    assert len(pids) >= 8
    assert ready(tmp_path)["isolation"] == {"reduced": []}
    started.kill()
    started.wait()
    gone_within_a_second(pids)


@pytest.mark.long
@pytest.mark.interop
def test_strace_sees_no_file_opened_after_the_mark_of_a_boot(tmp_path: Path) -> None:
    log = tmp_path / "strace"
    started = boot(tmp_path / "state", wrap=(str(peer("strace")), "-f", "-s", "200", "-o", str(log)))
    # strace keeps Ctrl-C to itself; its child is the supervisor.
    (supervisor,) = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(supervisor), signal.SIGINT)
    started.wait(60)
    lines = log.read_text(errors="replace").splitlines()
    mark = re.compile(r'\d+ +write\(\d+, "\{\\"event\\":\\"confined')
    marks = {line.split()[0]: at for at, line in enumerate(lines) if mark.match(line)}
    assert len(marks) == 3  # the kernel and two services
    opening = re.compile(r"\d+ +(open|openat|openat2|execve|memfd_create|socket|connect)\(")
    for process, at in marks.items():
        after = [line for line in lines[at + 1 :] if line.startswith(process + " ")]
        assert len(after) > 50
        assert [line for line in after if opening.match(line)] == []
