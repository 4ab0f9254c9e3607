# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vTPM service: libtpms in a process of its own, which has a syscall socket and nothing else.

A loader calls `prime` before it locks the process down (the library is loaded and its callbacks get their machine
code there), and `main` after. `main` opens three objects of the kernel: ``events``, ``state`` (the TPM's file) and
``log``, and announces the TPM's EK name on ``announce`` when it is ready to serve.

Parameters (all text): ``front`` = ``socket`` | ``svsm``; ``start`` = ``fresh`` | ``failed`` (a replacement of a process
that died under its guest); ``libtpms`` = the library's path, needed only where `prime` was not called.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

from svsm.abi.syscall import MAX_FILE_BYTES
from svsm.formats.errors import StateError, SvsmError
from svsm.services.syscalls import Kernel, KernelGone
from svsm.services.vtpm.library import Library
from svsm.services.vtpm.server import Server
from svsm.services.vtpm.tpm import Tpm

__all__ = ["ANNOUNCE", "EVENTS", "LOG", "STATE", "main", "prime"]

EVENTS, STATE, LOG, ANNOUNCE = "events", "state", "log", "announce"
"""Names of the kernel's objects that this service opens."""

_primed: Library | None = None


def prime(library_path: str) -> None:
    """Load the TPM library and make its callbacks, before executable memory becomes impossible to get.

    Args:
        library_path: ``/proc/self/fd/N`` of the sealed memfd with libtpms, or a name for the loader.

    Raises:
        BackendError: ``tpm-library``, ``tpm-trampolines``.
    """
    global _primed
    if _primed is None:
        _primed = Library(library_path)
        _primed.freeze_trampolines()


def main(syscall_socket_fd: int, parameters: Mapping[str, str]) -> int:
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
    if _primed is None:
        prime(parameters.get("libtpms", "libtpms.so.0"))
    if _primed is None:
        raise StateError("the TPM library is not loaded", code="tpm-parameters")
    state, events = kernel.open(STATE), kernel.open(EVENTS)
    tpm = Tpm(
        _primed,
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
