# SPDX-License-Identifier: MIT OR Apache-2.0
"""Starts payload processes as hardware does, and talks to the probe inside them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svsm.confine.identity import role_uid
from svsm.hardware.spawn import Process, Spawner, sealed_memfd, spawn_kernel, spawn_service
from svsm.launch.payload import Payload, build_payload

__all__ = ["ENTRIES", "ROOT", "Probe", "events", "kernel", "probe_payload", "service"]

ROOT = Path(__file__).parents[2]
ENTRIES = {
    "kernel": "tests.payload_probe.probe_kernel:main",
    "vtpm": "tests.payload_probe.probe_service:main",
}
_PAYLOAD_GPA = 0x0800_0000


@functools.cache
def probe_payload() -> Payload:
    """The payload with the probes as its entries."""
    return build_payload(entries=ENTRIES, roots=[ROOT])


@dataclasses.dataclass
class Probe:
    """A running payload process that evaluates expressions."""

    process: Process
    control: socket.socket
    console: int
    first: dict[str, Any] = dataclasses.field(default_factory=dict)

    def ask(self, expression: str) -> Any:
        """The value of an expression inside the process; raises EOFError when the process died of it."""
        self.control.sendall(json.dumps(expression).encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            self.control.settimeout(20)
            chunk = self.control.recv(1 << 20)
            if not chunk:
                raise EOFError("the process ended")
            data += chunk
        answer = json.loads(data)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def executable_paths(self) -> list[str]:
        """What is behind the process's executable mappings; needs the right to look (root)."""
        rows = [line.split(None, 5) for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()]
        return sorted({row[5] if len(row) > 5 else "" for row in rows if "x" in row[1]})


def events(console: int) -> dict[str, Any]:
    """The next line of the console."""
    assert select.select([console], [], [], 20)[0], "the process says nothing"
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(console, 1)):
        line += byte
    return json.loads(line) if line else {}


@contextlib.contextmanager
def kernel(
    payload: Payload | None = None, *, spawner: Spawner | None = None, cap: int | None = None, uid: int | None = -1
) -> Iterator[Probe]:
    """A process of role kernel, its payload in a private memory as the hardware would have it."""
    payload = payload or probe_payload()
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    private = os.memfd_create("private")
    os.ftruncate(private, 1 << 40)
    os.pwrite(private, payload.archive, _PAYLOAD_GPA)
    try:
        process = spawn_kernel(
            payload.loader,
            {"rdx": _PAYLOAD_GPA, "r8": len(payload.archive), "rsi": 0x0780_0000},
            {"private": private, "control": theirs.fileno(), "console": writer},
            uid=role_uid("kernel") if uid == -1 else uid,
            landlock_cap=cap,
            spawner=spawner,
        )
    finally:
        theirs.close()
        os.close(writer)
        os.close(private)
    with _running(process, ours, reader, spawner) as probe:
        yield probe


@contextlib.contextmanager
def service(
    payload: Payload | None = None, *, spawner: Spawner | None = None, cap: int | None = None
) -> Iterator[Probe]:
    """A process of role vtpm."""
    payload = payload or probe_payload()
    reader, writer = os.pipe()
    archive = sealed_memfd("archive", payload.archive)
    try:
        process, ours = spawn_service(
            archive,
            "vtpm",
            {"name": "tpm 0"},
            loader_text=payload.loader,
            uid=role_uid("service", 7),
            console=writer,
            landlock_cap=cap,
            spawner=spawner,
        )
    finally:
        os.close(writer)
        os.close(archive)
    with _running(process, ours, reader, spawner) as probe:
        yield probe


@contextlib.contextmanager
def _running(process: Process, ours: socket.socket, console: int, spawner: Spawner | None) -> Iterator[Probe]:
    try:
        yield Probe(process, ours, console, events(console))
    finally:
        ours.close()
        select.select([process.descriptor], [], [], 20)
        if spawner is None:
            os.waitpid(process.pid, 0)
        process.close()
        os.close(console)
