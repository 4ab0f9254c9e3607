# SPDX-License-Identifier: MIT OR Apache-2.0
"""The measured payload: everything that runs inside the confidential VM, as one reproducible archive.

What is in it: the code of the kernel and its services (their import closure), of the standard library modules and
third-party packages that they use, the shared objects of those packages and of libtpms, and a manifest. What is not:
the interpreter, its compiled standard library modules and the C library, which play the CPU. Those are named in the
manifest by hash; the standard library's sources too, although the code in the archive is what runs: the two must
come from the same release.

The archive is a stored zip: members sorted, time stamps 1980, no owner, no comment, no extra fields, so the same
inputs give the same bytes wherever and by whomever it is built, and anybody can look inside with `unzip -l`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import svsm
from svsm.confine import callbacks
from svsm.formats.errors import BackendError
from svsm.launch.payload_elf import GLIBC, find_library, read_elf
from svsm.launch.payload_manifest import Listed, Load, Manifest, RoleManifest
from svsm.launch.payload_modules import Module, ModuleCache, Modules, default_cache

__all__ = ["ENTRIES", "LIBRARIES", "LOADER", "LOADER_NEEDS", "Payload", "build_payload"]

ENTRIES: Mapping[str, str] = {"kernel": "svsm.kernel.boot:main", "vtpm": "svsm.services.vtpm:main"}
"""Role to ``module:function``."""

LIBRARIES: Mapping[str, tuple[str, ...]] = {"vtpm": ("libtpms.so.0",)}
"""Shared objects that a role opens by name."""

LOADER = Path(svsm.__file__).parent / "kernel" / "loader.py"

LOADER_NEEDS = ("svsm.confine", "svsm.confine.callbacks", "svsm.confine.context", "ctypes", "fcntl", "json")
"""What the loader itself imports once it serves imports."""
_ALWAYS = ("traceback", "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "encodings.aliases", "_hashlib")
_MEASURED_CRYPTO = "libcrypto.so.3"
_SLOTS = "native/callback-slots"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """What `svsm igvm build` puts into measured pages."""

    loader: bytes
    """Python source text of the loader."""
    archive: bytes
    """A stored zip."""
    manifest: Manifest


class _Builder:
    """Collects one archive."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.members: dict[str, bytes] = {}
        self.sources: dict[str, Listed] = {}
        self.extensions: dict[str, Listed] = {}
        self.environment: dict[str, str] = {}
        self.objects: dict[str, str] = {}
        self.standard: frozenset[str] = frozenset()

    def add_object(self, name: str, data: bytes) -> None:
        self.members[name] = data
        self.objects[name] = hashlib.sha256(data).hexdigest()

    def add_role(self, role: str, entry: str, libraries: Sequence[str]) -> RoleManifest:
        closure = self.modules.closure([entry.partition(":")[0], *LOADER_NEEDS, *_ALWAYS])
        loads: list[Load] = []
        if self._measured_crypto(closure):
            self._library(_MEASURED_CRYPTO, (), "", loads)
        else:
            closure.pop("_hashlib", None)
        for module in closure.values():
            if module.kind == "extension" and module.standard:
                self._environment(module)
        for library in libraries:
            self._library(library, (), "", loads)
        for module in closure.values():
            if module.kind == "source":
                self._source(module)
            elif module.kind == "extension" and not module.standard:
                self._extension(module, loads)
        standard = [module for module in closure.values() if module.standard]
        return RoleManifest(
            entry,
            tuple(module.name for module in standard if module.kind == "source"),
            tuple(module.name for module in standard if module.kind == "extension"),
            tuple(dict.fromkeys(loads)),
        )

    def _measured_crypto(self, closure: Mapping[str, Module]) -> bool:
        """Whether _hashlib can run on the payload's own libcrypto; otherwise the built-in hashes do its work."""
        module = closure.get("_hashlib")
        if module is None or module.kind != "extension":
            return False
        return set(read_elf(self.modules.source(module)).needed) - GLIBC == {_MEASURED_CRYPTO}

    def _source(self, module: Module) -> None:
        below = module.name.replace(".", "/") + ("/__init__" if module.package else "")
        self.members[f"code/{below}.pyc"] = self.modules.code(module)
        if module.standard:
            digest = hashlib.sha256(self.modules.source(module)).hexdigest()
            self.sources[module.name] = Listed(module.relative, digest)

    def _environment(self, module: Module) -> None:
        """A compiled module of the standard library, and the objects that it needs: files outside, by hash."""
        data = self.modules.source(module)
        self.extensions[module.name] = Listed(module.relative, hashlib.sha256(data).hexdigest())
        elf = read_elf(data)
        self.add_environment(name for name in elf.needed if name != _MEASURED_CRYPTO)

    def add_environment(self, sonames: Iterable[str], runpath: tuple[str, ...] = (), origin: str = "") -> None:
        for soname in sonames:
            path = find_library(soname, runpath, origin)
            if os.path.basename(path) not in self.environment:
                data = _read(path)
                self.environment[os.path.basename(path)] = hashlib.sha256(data).hexdigest()
                self.standard |= {soname}
                self.add_environment(read_elf(data).needed, runpath, origin)

    def _library(self, soname: str, runpath: tuple[str, ...], origin: str, loads: list[Load]) -> None:
        """A shared object of the payload, after the ones that it needs."""
        name = f"native/{soname}"
        if soname in GLIBC or soname in self.standard:
            self.add_environment([soname])
            return
        if name not in self.members:
            path = find_library(soname, runpath, origin)
            self.add_object(name, _read(path))
        elf = read_elf(self.members[name])
        for needed in elf.needed:
            self._library(needed, elf.runpath, "", loads)
        loads.append(Load(name))

    def _extension(self, module: Module, loads: list[Load]) -> None:
        data = self.modules.source(module)
        elf = read_elf(data)
        for needed in elf.needed:
            self._library(needed, elf.runpath, os.path.dirname(module.path), loads)
        name = f"native/{os.path.basename(module.path)}"
        self.add_object(name, data)
        loads.append(Load(name, module.name))


def build_payload(
    *,
    entries: Mapping[str, str] | None = None,
    libraries: Mapping[str, tuple[str, ...]] | None = None,
    roots: Sequence[Path] = (),
    cache: str | None = "",
) -> Payload:
    """Build loader, archive and manifest from the code that is installed here.

    Args:
        entries: Role to ``module:function``; default `ENTRIES`.
        libraries: Role to the SONAMEs that it opens; default `LIBRARIES`.
        roots: Folders with further packages, looked at before svsm's own.
        cache: File that keeps compiled code between builds; "" for the default place, None for none.

    Raises:
        FormatError: ``payload-import``, ``payload-module``, ``payload-elf``, ``payload-manifest``.
        BackendError: ``payload-library-missing``, ``payload-read``.
    """
    entries = ENTRIES if entries is None else entries
    libraries = LIBRARIES if libraries is None else libraries
    own = [*map(str, roots), str(Path(svsm.__file__).parent.parent)]
    compiled = ModuleCache(default_cache() if cache == "" else cache)
    builder = _Builder(Modules(own, compiled))
    builder.add_object(_SLOTS, callbacks.slot_code())
    interpreter = _read("/proc/self/exe")
    elf = read_elf(interpreter)
    builder.add_environment(elf.needed, elf.runpath, os.path.dirname(os.path.realpath("/proc/self/exe")))
    # The dynamic linker of the C library is mapped although nothing names it.
    builder.add_environment(["ld-linux-x86-64.so.2"])
    roles = {role: builder.add_role(role, entry, libraries.get(role, ())) for role, entry in sorted(entries.items())}
    compiled.save()
    manifest = Manifest(
        " ".join(sys.version.split()),
        hashlib.sha256(interpreter).hexdigest(),
        builder.environment,
        builder.sources,
        builder.extensions,
        builder.objects,
        roles,
    )
    builder.members["manifest"] = manifest.pack()
    return Payload(_read(str(LOADER)), _archive(builder.members), manifest)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BackendError("a file of the payload can't be read", code="payload-read", path=path) from error


def _archive(members: Mapping[str, bytes]) -> bytes:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(members.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o100444 << 16
            archive.writestr(info, data)
    return output.getvalue()
