# SPDX-License-Identifier: MIT OR Apache-2.0
"""A service that was started again has a uid that no other service has."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, cast

import pytest

from svsm.formats.errors import BackendError, StateError
from svsm.hardware import spawn
from svsm.hardware.machine import KernelStart, Spawned
from svsm.hardware.processes import ConfinedProcesses


class _Spawner:
    def status(self, process: spawn.Process) -> int:
        del process
        return 0


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The uids that services were started with, -1 in the end for a start that failed."""
    uids: list[int | None] = []

    def ended_process() -> spawn.Process:
        return spawn.Process(1, os.eventfd(1))

    def start_service(
        archive: int, name: str, parameters: Mapping[str, str], *, uid: int | None, **_more: Any
    ) -> tuple[spawn.Process, socket.socket]:
        del archive, parameters
        if name == "broken":
            raise BackendError("no", code="spawn-failed")
        uids.append(uid)
        return ended_process(), socket.socket(socket.AF_UNIX)

    monkeypatch.setattr(spawn, "spawn_kernel", lambda *_arguments, **_more: ended_process())
    monkeypatch.setattr(spawn, "spawn_service", start_service)
    return uids


def _processes(uids: list[int]) -> ConfinedProcesses:
    processes = ConfinedProcesses(cast(spawn.Spawner, _Spawner()), service_uids=uids)
    processes.kernel(KernelStart(b"", {}), {}).collect()
    return processes


def _service(processes: ConfinedProcesses) -> Spawned:
    process, connection = processes.service("vtpm", 0, {})
    connection.close()
    return process


def test_a_uid_is_given_again_only_when_its_service_has_ended(given: list[int | None]) -> None:
    processes = _processes([100, 101])
    first, second = _service(processes), _service(processes)
    with pytest.raises(StateError):
        _service(processes)
    first.collect()
    again = _service(processes)
    assert given == [100, 101, 100]
    second.collect()
    again.collect()


def test_a_start_that_fails_uses_up_no_uid(given: list[int | None]) -> None:
    processes = _processes([100])
    for _ in range(3):
        with pytest.raises(BackendError):
            processes.service("broken", 0, {})
    _service(processes).collect()
    assert given == [100]


def test_without_uids_of_their_own_services_start_all_the_same(given: list[int | None]) -> None:
    processes = _processes([])
    for started in [_service(processes) for _ in range(3)]:
        started.collect()
    assert given == [None, None, None]
