# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vTPM service: libtpms in a process of its own, which has a syscall socket and nothing else.

The measured loader calls `main` in a process that is locked down. The service opens three objects of the kernel by
name: ``events``, ``state`` (the TPM's file) and ``log``, and announces the TPM's EK name on ``announce`` when it is
ready to serve.

Parameters (all text): ``front`` = ``socket`` | ``svsm``; ``start`` = ``fresh`` | ``failed`` (a replacement of a process
that died under its guest).
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

from svsm.abi.syscall import MAX_FILE_BYTES
from svsm.confine import callbacks
from svsm.confine.context import ProcessContext
from svsm.formats.errors import StateError, SvsmError
from svsm.services.syscalls import Kernel, KernelGone
from svsm.services.vtpm.library import Library
from svsm.services.vtpm.server import Server
from svsm.services.vtpm.tpm import Tpm

__all__ = ["ANNOUNCE", "EVENTS", "LOG", "STATE", "main", "run"]

EVENTS, STATE, LOG, ANNOUNCE = "events", "state", "log", "announce"
"""Names of the kernel's objects that this service opens."""

_LIBRARY = "libtpms.so.0"
"""In a payload process it is loaded already, from a sealed memfd; the name finds that one and opens no file."""


def main(context: ProcessContext) -> int:
    """The entry point for the measured loader: descriptor ``syscall``, parameters as the module says.

    Returns:
        The exit status, see `run`.

    Raises:
        StateError: ``tpm-parameters`` without that descriptor.
    """
    descriptor = context.descriptors.get("syscall")
    if descriptor is None:
        raise StateError("the vTPM service was started without a syscall socket", code="tpm-parameters")
    return run(descriptor, context.parameters)


def run(syscall_socket_fd: int, parameters: Mapping[str, str]) -> int:
    """Serve one TPM until the kernel ends it.

    Args:
        syscall_socket_fd: The service's end of the syscall socket.
        parameters: See the module.

    Returns:
        0 after an orderly stop, 1 when the kernel went away or the TPM could not be started.
    """
    kernel = Kernel(syscall_socket_fd)
    try:
        return _serve(kernel, parameters)
    except KernelGone:
        return 1
    except SvsmError as error:
        _complain(kernel, error)
        return 1
    finally:
        kernel.close()


def _serve(kernel: Kernel, parameters: Mapping[str, str]) -> int:
    front, start = parameters.get("front"), parameters.get("start", "fresh")
    if front not in ("socket", "svsm") or start not in ("fresh", "failed"):
        raise StateError("the vTPM service was started with wrong parameters", code="tpm-parameters")
    state, events = kernel.open(STATE), kernel.open(EVENTS)
    tpm = Tpm(
        Library(_LIBRARY, executable=callbacks.executable),
        lambda: kernel.read(state, max_bytes=MAX_FILE_BYTES),
        lambda data: kernel.replace({state: data}),
    )
    tpm.prepare(new_guest=start == "fresh")
    if start == "fresh":
        tpm.power_on(startup=front == "socket")
    server = Server(kernel, tpm, events=events, sockets=front == "socket")
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    kernel.write(kernel.open(ANNOUNCE), tpm.ek_name or b"")
    server.run()
    return 0


def _complain(kernel: Kernel, error: SvsmError) -> None:
    try:
        kernel.write(kernel.open(LOG), f"{error.code}: {error}".encode()[:1024])
    except SvsmError:
        return
