# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vTPM service out of the measured payload, in a locked-down process: it works there, and what is in its maps."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping

import pytest

from svsm.abi.syscall import Endpoint, Transport
from svsm.formats import tpm
from svsm.hardware.spawn import Process, sealed_memfd, spawn_service
from svsm.kernel.events import EventLoop
from svsm.kernel.processes import ProcessTable
from svsm.kernel.tpm import TpmService
from svsm.launch.payload import ENTRIES, Payload, build_payload
from svsm.testing.file_store import MemoryFileStore
from tests.unit.services.test_vtpm_library import library

pytestmark = pytest.mark.e2e

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="looking into a non-dumpable process needs root")


@pytest.fixture(scope="module")
def payload() -> Payload:
    library()  # skips without libtpms
    return build_payload(entries={"vtpm": ENTRIES["vtpm"]})


class Machine:
    """The kernel's loop, and services that a loader starts."""

    def __init__(self, payload: Payload) -> None:
        self.loop = EventLoop()
        self.started: list[Process] = []
        self.names: list[bytes | None] = []
        self.lines: list[str] = []
        self.store = MemoryFileStore()
        self._payload = payload
        self._archive = sealed_memfd("payload:archive", payload.archive)
        self.tpm = TpmService(
            ProcessTable(self.loop, self._spawn, lambda _connection: None),
            name="confined",
            front="socket",
            store=self.store,
            inode=1,
            log=self.lines.append,
            on_ready=self.names.append,
        )
        self.tpm.release()
        self.tpm.start()

    def _spawn(self, service: str, parameters: Mapping[str, str]) -> socket.socket:
        process, kernel_end = spawn_service(self._archive, service, parameters, loader_text=self._payload.loader)
        self.started.append(process)
        return kernel_end

    def client(self, endpoint: Endpoint) -> socket.socket:
        """A client; answers come while `ask` lets the loop run."""
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        self.tpm.connect(theirs.detach(), endpoint, Transport.UNIX)
        self.loop.run_until(lambda: False, timeout_seconds=0.05)
        return ours

    def ready(self, times: int) -> None:
        """Until the service has been ready so many times."""
        assert self.loop.run_until(lambda: len(self.names) >= times, timeout_seconds=30), self.lines

    def close(self) -> None:
        """Stop in order."""
        done: list[bool] = []
        self.tpm.stop(lambda: done.append(True))
        self.loop.run_until(lambda: bool(done), timeout_seconds=10)
        for process in self.started:
            os.waitid(os.P_PIDFD, process.descriptor, os.WEXITED)
            os.close(process.descriptor)
        os.close(self._archive)
        self.loop.close()


@pytest.fixture
def machine(payload: Payload) -> Iterator[Machine]:
    made = Machine(payload)
    yield made
    made.close()


def _ask(client: socket.socket, command: bytes) -> bytes:
    client.sendall(command)
    return client.recv(8192)


def test_it_serves_stores_and_comes_back_in_failure_mode(machine: Machine) -> None:
    machine.ready(1)
    with machine.client(Endpoint.DATA) as data, machine.client(Endpoint.CONTROL) as control:
        assert len(_ask(data, tpm.get_random(8))) == 20
        _, public = tpm.parse_create_primary(_ask(data, tpm.create_ek()))
        assert tpm.ek_name(public) == machine.names[0]
        ours, theirs = socket.socketpair()
        socket.send_fds(control, [(16).to_bytes(4, "big")], [theirs.fileno()])  # CMD_SET_DATAFD
        assert control.recv(4) == bytes(4)
        theirs.close()
        with ours:
            assert len(_ask(ours, tpm.get_random(8))) == 20
    assert machine.store.replacements >= 2
    os.kill(machine.started[0].pid, signal.SIGKILL)
    machine.ready(2)
    assert machine.names[0] == machine.names[1]
    with machine.client(Endpoint.DATA) as data:
        assert _ask(data, tpm.get_random(8)) == tpm.failure_response()


@as_root
def test_no_memory_is_writable_and_executable_and_all_code_has_a_source(machine: Machine) -> None:
    machine.ready(1)
    with open(f"/proc/{machine.started[0].pid}/maps") as maps:
        lines = [line.split(maxsplit=5) for line in maps]
    executable = [fields for fields in lines if "x" in fields[1]]
    assert executable
    for fields in executable:
        assert "w" not in fields[1]
        assert len(fields) == 6, "anonymous executable memory"
    own = [fields[5] for fields in executable if "memfd:" in fields[5]]
    assert any("libtpms.so.0" in name for name in own)
    assert all(name.startswith("/memfd:payload:") for name in own)


@as_root
def test_it_holds_nothing_but_its_sockets_and_the_payload(machine: Machine) -> None:
    machine.ready(1)
    with machine.client(Endpoint.DATA) as data:
        assert len(_ask(data, tpm.get_random(8))) == 20
        folder = f"/proc/{machine.started[0].pid}/fd"
        held = sorted(os.readlink(f"{folder}/{name}").partition("[")[0] for name in os.listdir(folder))
    loader = ["/memfd:loader (deleted)", "/memfd:payload:archive (deleted)"]  # sealed, and no secret
    assert held == ["/dev/null"] * 3 + loader + ["anon_inode:", "socket:", "socket:"]
