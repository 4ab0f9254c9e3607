# SPDX-License-Identifier: MIT OR Apache-2.0
"""A service-like entry: libtpms and a callback from C through cffi, no cryptography."""

from __future__ import annotations

import os
import sys
from typing import Any

import _cffi_backend
import cffi

from svsm.confine import callbacks, libc
from svsm.confine.context import ProcessContext
from tests.payload_probe import probe_loop


def main(context: ProcessContext) -> int:
    """Serve the syscall socket."""
    ffi = cffi.FFI()
    ffi.cdef("uint32_t TPMLIB_GetVersion(void);")
    library: Any = ffi.dlopen("libtpms.so.0")
    held: Any = ffi.callback("int(int)", lambda value: value + 1)
    address = callbacks.executable(int(ffi.cast("uintptr_t", held)))
    names: dict[str, Any] = {
        "_cffi_backend": _cffi_backend,
        "call": ffi.cast("int(*)(int)", address),
        "callbacks": callbacks,
        "context": context,
        "ffi": ffi,
        "held": held,
        "libc": libc,
        "os": os,
        "origins": probe_loop.origins,
        "sys": sys,
        "version": library.TPMLIB_GetVersion(),
    }
    return probe_loop.serve(context.descriptors["syscall"], names)
