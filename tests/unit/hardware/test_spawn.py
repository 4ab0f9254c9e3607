# SPDX-License-Identifier: MIT OR Apache-2.0
"""Starting processes: what is handed over, what is refused, what is left of a start that fails."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svsm.formats.errors import BackendError, StateError
from svsm.hardware.spawn import Process, sealed_memfd, spawn_kernel, spawn_service, start_spawner

SHOW = b"""
import os
os.write(5, repr({
    "environment": dict(os.environ),
    "descriptors": sorted(int(n) for n in os.listdir("/proc/self/fd")),
    "read": os.pread(4, 100, 0),
    "flags": (__import__("sys").flags.isolated, __import__("sys").flags.no_site),
}).encode())
"""


def ended(process: Process) -> int:
    assert select.select([process], [], [], 20)[0]
    assert process.ended()
    process.close()
    return os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])


def test_only_the_named_descriptors_arrive() -> None:
    reader, writer = os.pipe()
    stray, other = socket.socketpair()
    os.set_inheritable(stray.fileno(), True)
    memory = sealed_memfd("m", b"a page")
    with stray, other:
        process = spawn_kernel(SHOW, {"rdx": 0x1000, "r8": 5}, {"private": memory, "console": writer})
    os.close(writer)
    os.close(memory)
    with open(reader, "rb") as answer:
        seen = eval(answer.read())
    assert ended(process) == 0
    assert seen["descriptors"] == [0, 1, 2, 3, 4, 5, 6]  # 6 is the listing itself
    assert seen["read"] == b"a page"
    assert seen["flags"] == (1, 1)
    assert {name for name in seen["environment"] if not name.startswith("SVSM_")} <= {"LC_CTYPE"}
    assert seen["environment"]["SVSM_REGISTERS"] == "rdx=1000,r8=5"
    assert seen["environment"]["SVSM_DESCRIPTORS"] == "private=4,console=5"
    assert seen["environment"]["SVSM_PARENT"] == str(os.getpid())


def test_crossed_descriptor_numbers_arrive_right() -> None:
    """A source whose number is the target of another must not be overwritten on the way."""
    reader, writer = os.pipe()
    holders = [os.dup(writer) for _ in range(8)]
    memory = sealed_memfd("m", b"right")
    process = spawn_kernel(SHOW, {}, {"private": memory, "console": writer, **{f"x{n}": n for n in holders}})
    for number in (*holders, writer, memory):
        os.close(number)
    with open(reader, "rb") as answer:
        assert b"'read': b'right'" in answer.read()
    assert ended(process) == 0


def test_a_sealed_memfd_stays_as_it_is() -> None:
    descriptor = sealed_memfd("m", b"text")
    for attempt in (lambda: os.write(descriptor, b"x"), lambda: os.ftruncate(descriptor, 0)):
        with pytest.raises(PermissionError):
            attempt()
    os.close(descriptor)


@pytest.mark.parametrize(("service", "parameters"), [("kernel", {}), ("vtpm", {"a=b": "1"}), ("vtpm", {"": "1"})])
def test_wrong_requests_are_refused(service: str, parameters: dict[str, str]) -> None:
    with pytest.raises(StateError) as caught:
        spawn_service(0, service, parameters, loader_text=b"")
    assert caught.value.code == "spawn-request"


def test_too_many_descriptors_are_refused() -> None:
    with start_spawner() as spawner:
        for by in (None, spawner):
            with pytest.raises(StateError) as caught:
                spawn_kernel(b"", {}, {f"d{n}": 0 for n in range(33)}, spawner=by)
            assert caught.value.code == "spawn-request"
        process = spawn_kernel(b"raise SystemExit(5)", {}, {f"d{n}": 0 for n in range(32)}, spawner=spawner)
        assert select.select([process], [], [], 20)[0]
        assert spawner.status(process) == 5
        process.close()


def test_a_spawner_that_is_gone_is_an_error() -> None:
    spawner = start_spawner()
    os.kill(spawner.pid, signal.SIGKILL)
    with pytest.raises(BackendError) as caught:
        spawn_kernel(b"", {}, {}, spawner=spawner)
    assert caught.value.code == "spawn-failed"
    spawner.close()


def test_the_spawner_survives_a_loader_that_does_not_run() -> None:
    with start_spawner() as spawner:
        for _ in range(3):
            process = spawn_kernel(b"raise SystemExit(7)", {}, {}, spawner=spawner)
            assert select.select([process], [], [], 20)[0]
            assert spawner.status(process) == 7
            spawner.kill(process)
            process.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to give up")
def test_the_spawner_keeps_four_capabilities_only() -> None:
    with start_spawner() as spawner:
        process = spawn_kernel(b"import time; time.sleep(60)", {}, {}, spawner=spawner)
        for pid in (spawner.pid, process.pid):
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            sets = dict(line.split(":\t", 1) for line in status.splitlines() if line.startswith(("Cap", "NoNew")))
            allowed = 1 << 2 | 1 << 5 | 1 << 6 | 1 << 7
            assert int(sets["CapEff"], 16) & ~allowed == 0
            assert int(sets["CapBnd"], 16) & ~allowed == 0
            assert sets["NoNewPrivs"].strip() == "1"
        spawner.kill(process)
        process.close()


def test_everything_dies_with_hardware() -> None:
    script = (
        "import os, time\n"
        "from svsm.hardware.spawn import spawn_kernel, start_spawner\n"
        "spawner = start_spawner()\n"
        "process = spawn_kernel(b'import time; time.sleep(60)', {}, {}, spawner=spawner)\n"
        "print(spawner.pid, process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as hardware:
        assert hardware.stdout is not None
        pids = [int(word) for word in hardware.stdout.readline().split()]
        hardware.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
