# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which shared objects a shared object needs, and where this machine keeps them.

Reads only the dynamic section of little-endian ELF64 (DT_NEEDED, DT_SONAME, DT_RUNPATH): the files are the build
machine's own, but a damaged one must still end in an error. Libraries are looked for where the dynamic linker looks:
beside the interpreter, in its RUNPATH, and in the distribution's folders; ld.so.cache is not read.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import sys

from svsm.formats.errors import BackendError, FormatError

__all__ = ["GLIBC", "Elf", "find_library", "read_elf"]

GLIBC = frozenset(
    [
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
        "libutil.so.1",
        "libresolv.so.2",
        "ld-linux-x86-64.so.2",
    ]
)
"""The C library's own objects: they belong to the environment, never to the payload."""

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 14, 15, 29
_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/usr/local/lib", "/lib")


@dataclasses.dataclass(frozen=True, slots=True)
class Elf:
    """The dynamic section's names."""

    soname: str | None
    needed: tuple[str, ...]
    runpath: tuple[str, ...]


def read_elf(data: bytes) -> Elf:
    """Parse a shared object or dynamic executable.

    Raises:
        FormatError: ``payload-elf``.
    """
    try:
        return _read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise FormatError("a shared object is damaged", code="payload-elf") from error


def _read(data: bytes) -> Elf:
    if data[:6] != b"\x7fELF\x02\x01":
        raise FormatError("a shared object is not little-endian ELF64", code="payload-elf")
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, table + size * index) for index in range(count)]
    loads = [(h[3], h[2], h[5]) for h in headers if h[0] == _PT_LOAD]
    entries: list[tuple[int, int]] = []
    for header in headers:
        if header[0] == _PT_DYNAMIC:
            section = data[header[2] : header[2] + header[5] // 16 * 16]
            for tag, value in struct.iter_unpack("<QQ", section):
                if tag == _DT_NULL:
                    break
                entries.append((tag, value))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if strings is None:
        return Elf(None, (), ())
    bases = [strings - address + offset for address, offset, size in loads if address <= strings < address + size]
    if not bases:
        raise FormatError("a shared object's names are outside of it", code="payload-elf")

    def text(offset: int) -> str:
        start = bases[0] + offset
        return data[start : data.index(b"\0", start)].decode()

    named = {tag: text(value) for tag, value in entries if tag in (_DT_SONAME, _DT_RPATH, _DT_RUNPATH)}
    path = named.get(_DT_RUNPATH) or named.get(_DT_RPATH) or ""
    needed = tuple(text(value) for tag, value in entries if tag == _DT_NEEDED)
    return Elf(named.get(_DT_SONAME), needed, tuple(part for part in path.split(":") if part))


def find_library(soname: str, runpath: tuple[str, ...] = (), origin: str = "") -> str:
    """The real path of a shared object by its SONAME.

    Args:
        soname: E.g. ``libtpms.so.0``.
        runpath: Folders of the object that needs it; ``$ORIGIN`` is its own folder.
        origin: The folder of the object that needs it.

    Raises:
        BackendError: ``payload-library-missing``.
    """
    own = [folder.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for folder in runpath]
    for folder in [*own, os.path.join(sys.base_prefix, "lib"), *_FOLDERS]:
        path = os.path.join(folder, soname)
        if os.path.isfile(path):
            return os.path.realpath(path)
    raise BackendError(
        "a shared object that the payload needs is not installed",
        code="payload-library-missing",
        hint=f"install the package that has {soname} (libtpms.so.0 is in libtpms0)",
        library=soname,
    )
