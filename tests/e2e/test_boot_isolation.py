# SPDX-License-Identifier: MIT OR Apache-2.0
"""A running system, looked at from outside by root: who holds which memory, files and code, under which uid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from svsm.confine import Role
from svsm.confine.identity import role_uid
from svsm.launch.payload import build_payload
from tests.support import peer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="looking into non-dumpable processes needs root"),
]

ALL = {"svsm-private", "svsm-vmpl2", "svsm-shared"}
MEMORY: dict[Role | None, set[str]] = {
    Role.KERNEL: ALL,
    Role.SERVICE: set(),
    Role.HARDWARE: ALL,
    Role.SPAWNER: set(),
    Role.VCPU: {"svsm-vmpl2", "svsm-shared"},
    Role.HOST: {"svsm-shared"},
    Role.PROXY: set(),
    Role.BROKER: set(),
    None: set(),
}
"""The memories that a role may hold or map; None is the supervisor."""

FILES: dict[Role | None, str] = {
    Role.KERNEL: r"disk\.img$",
    Role.BROKER: r"broker\.sqlite(-wal|-shm)?$",
    None: r"/(lock|out)$",
}
"""The files that a role may hold, besides /dev/null."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One process of the system."""

    pid: int
    role: Role | None
    uid: int
    status: dict[str, str]
    descriptors: tuple[str, ...]
    mapped: tuple[str, ...]
    executable: tuple[str, ...]

    @property
    def memories(self) -> set[str]:
        """Names of the guest memories it holds or maps."""
        places = (*self.descriptors, *self.mapped)
        named = {match[1] for place in places if (match := re.match(r"/memfd:([\w-]+)", place))}
        return named & ALL


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
        tuple(row[5] for row in rows if len(row) > 5),
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


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Seen]]:
    started = boot(tmp_path_factory.mktemp("boot") / "state")
    yield family(started.pid)
    started.send_signal(signal.SIGINT)
    started.wait(20)


def test_every_role_is_there(system: list[Seen]) -> None:
    roles = [seen.role for seen in system]
    assert set(MEMORY) - set(roles) <= {Role.VCPU}  # without the emulator there is no vCPU
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


def test_memory_is_held_by_who_may_see_it(system: list[Seen]) -> None:
    for seen in system:
        assert seen.memories == MEMORY[seen.role], seen.role


def test_no_process_holds_a_file_that_is_not_its_own(system: list[Seen]) -> None:
    for seen in system:
        files = [place for place in seen.descriptors if place.startswith("/") and not place.startswith("/memfd:")]
        wrong = [p for p in files if p != "/dev/null" and not re.search(FILES.get(seen.role, r"(?!)"), p)]
        assert wrong == [], seen.role


def test_kernel_and_services_run_measured_code_only(system: list[Seen]) -> None:
    manifest = build_payload().manifest
    listed = {*manifest.libraries.values(), *(item.sha256 for item in manifest.extensions.values())}
    for seen in system:
        if seen.role in (Role.KERNEL, Role.SERVICE):
            outside = [p for p in seen.executable if not p.startswith("/memfd:payload:native/")]
            for path in set(outside) - {"[vdso]", "[vsyscall]"}:
                assert path, f"{seen.role}: executable memory without a file"
                assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in {*listed, manifest.interpreter}, path


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
    holders = {seen.role for seen in system if any(needle in _memory(seen.pid) for needle in needles)}
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
    time.sleep(0.5)
    assert all(_alive(seen.pid) for seen in system)


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
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.01)
    assert [pid for pid in pids if _alive(pid)] == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


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
