# SPDX-License-Identifier: MIT OR Apache-2.0
"""The handful of C calls that Python has no name for: prctl, raw system calls, memory mapped at an address.

All but the last go through `syscall(2)`, so that no symbol must exist in the libc at hand. Errors come back as negative
errno values, as the kernel returns them: the callers decide what a refusal means.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

__all__ = ["buffer", "mapping_calls", "prctl", "syscall"]

_PRCTL = 157


@functools.cache
def _entry() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def syscall(number: int, *arguments: int) -> int:
    """Make a raw system call.

    Args:
        number: The x86-64 number.
        arguments: Up to six 64-bit values.

    Returns:
        The kernel's answer, or minus the errno.
    """
    answer = _entry()(ctypes.c_long(number), *(ctypes.c_ulong(value & (2**64 - 1)) for value in arguments))
    return -ctypes.get_errno() if answer == -1 else answer


def prctl(option: int, argument: int = 0, third: int = 0) -> int:
    """prctl(2) with the unused arguments zero; the answer, or minus the errno."""
    return syscall(_PRCTL, option, argument, third, 0, 0)


@contextlib.contextmanager
def buffer(data: bytes) -> Iterator[int]:
    """The address of a writable copy of `data`, valid inside the with block."""
    holder = ctypes.create_string_buffer(data, len(data))
    yield ctypes.addressof(holder)


def mapping_calls() -> ctypes.CDLL:
    """The C library, whose `mmap`, `munmap` and `madvise` take and give addresses; errors are in `ctypes.get_errno`."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, length, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, length, number, number, number, ctypes.c_int64]
    libc.munmap.restype = number
    libc.munmap.argtypes = [address, length]
    libc.madvise.restype = number
    libc.madvise.argtypes = [address, length, number]
    return libc
