# SPDX-License-Identifier: MIT OR Apache-2.0
"""The machine's `Spawner` over `svsm.hardware.spawn`: confined processes, each on a uid of its own where there are any.

A service is started with the loader text that the kernel was started with, from the archive that the kernel hands
over sealed.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Mapping, Sequence

from svsm.formats.errors import StateError
from svsm.hardware import spawn
from svsm.hardware.machine import KernelStart, Spawned

__all__ = ["ConfinedProcesses"]


class _Started:
    def __init__(
        self, process: spawn.Process, spawner: spawn.Spawner, *, ended: Callable[[], None] = lambda: None
    ) -> None:
        self._process = process
        self._spawner = spawner
        self._ended = ended

    def fileno(self) -> int:
        return self._process.fileno()

    def collect(self) -> int:
        """Exit status; negative: the signal. Waits for the end."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        poll.poll()
        status = self._spawner.status(self._process)
        self._process.close()
        self._ended()
        return status if status is not None else 0

    def kill(self) -> None:
        self._spawner.kill(self._process)


class ConfinedProcesses:
    """See the module.

    Args:
        spawner: Forked before this process was confined.
        kernel_uid: The kernel's own uid, None to share the present one.
        service_uids: For services, rising: each gets the lowest that no other has. Empty: none.
        console: Where services write their event lines, or None.
        landlock_cap: Use no more than this Landlock ABI.
    """

    def __init__(
        self,
        spawner: spawn.Spawner,
        *,
        kernel_uid: int | None = None,
        service_uids: Sequence[int] = (),
        console: int | None = None,
        landlock_cap: int | None = None,
    ) -> None:
        self._spawner = spawner
        self._kernel_uid = kernel_uid
        self._separate = bool(service_uids)
        self._free_uids = list(service_uids)
        self._console = console
        self._landlock_cap = landlock_cap
        self._loader_text: bytes | None = None

    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        """See `svsm.hardware.machine.Spawner`. Raises ``spawn-failed``, ``spawn-request``."""
        self._loader_text = start.loader_text
        process = spawn.spawn_kernel(
            start.loader_text,
            start.registers,
            descriptors,
            uid=self._kernel_uid,
            landlock_cap=self._landlock_cap,
            spawner=self._spawner,
        )
        return _Started(process, self._spawner)

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        """See `svsm.hardware.machine.Spawner`. Raises ``spawn-failed``, ``spawn-request``."""
        if self._loader_text is None:
            raise StateError("no kernel was started", code="spawn-request")
        uid = self._take_uid()
        try:
            process, syscalls = spawn.spawn_service(
                archive,
                name,
                parameters,
                loader_text=self._loader_text,
                uid=uid,
                console=self._console,
                landlock_cap=self._landlock_cap,
                spawner=self._spawner,
            )
        except BaseException:
            self._give_back(uid)
            raise
        return _Started(process, self._spawner, ended=lambda: self._give_back(uid)), syscalls

    def _take_uid(self) -> int | None:
        if self._separate and not self._free_uids:
            raise StateError("every uid for services is in use", code="spawn-request")
        return self._free_uids.pop(0) if self._separate else None

    def _give_back(self, uid: int | None) -> None:
        if uid is not None:
            self._free_uids = sorted([*self._free_uids, uid])
