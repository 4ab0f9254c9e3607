# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the measured payload consists of, for people: docs/TCB.md, and the versions behind the manifest's hashes.

docs/TCB.md is exact, so that nothing in it changes unannounced: our own modules with lines, bytes and the first
twelve digits of their source's SHA-256, third-party packages with version and size. What the distribution brings (its
shared objects, the interpreter's modules) differs between machines and is there by name; `versions` and the manifest
say what it is on this one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import os
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import svsm
from svsm.formats.errors import BackendError
from svsm.launch.payload import ENTRIES, LOADER, LOADER_NEEDS, Payload, build_payload
from svsm.launch.payload_elf import find_library
from svsm.launch.payload_manifest import Manifest
from svsm.launch.payload_modules import Module, ModuleCache, Modules, default_cache

__all__ = ["COMMAND", "tcb_table", "versions"]

COMMAND = "./run svsm tcb --markdown > docs/TCB.md"
"""Writes the table anew."""

_DISTRIBUTION = {"libcrypto.so.3": "libssl3", "libgcc_s.so.1": "libgcc-s1", "libtpms.so.0": "libtpms0"}
"""Which Debian package a shared object is from."""

_PACKAGES = {"_cffi_backend": "cffi"}
"""Top-level module to the package it comes with, where the names differ."""

_HASH_DIGITS = 12


@dataclasses.dataclass(slots=True)
class _Size:
    modules: int = 0
    size_bytes: int = 0


def tcb_table() -> str:
    """docs/TCB.md.

    Raises:
        FormatError, BackendError: As `build_payload`.
    """
    payload = build_payload()
    modules = Modules([str(Path(svsm.__file__).parent.parent)], ModuleCache(default_cache()))
    roles: dict[str, list[str]] = {}
    found: dict[str, Module] = {}
    for role, entry in sorted(ENTRIES.items()):
        for name, module in modules.closure([entry.partition(":")[0], *LOADER_NEEDS]).items():
            roles.setdefault(name, []).append(role)
            found[name] = module
    lines = [
        "# What is measured and trusted",
        "",
        f"Written by `{COMMAND}`; a test fails when it differs from the code.",
        "All of it is in measured pages: changing one byte changes the launch digest.",
        "Hashes are the first twelve digits of the SHA-256 of the source.",
        "",
        *_own(modules, found, roles, payload.loader),
        "",
        "## Foreign code in the payload",
        "",
        *_packages(modules, found),
        "",
        *_objects(payload),
        "",
        *_standard(payload.manifest),
    ]
    return "\n".join(lines) + "\n"


def _own(modules: Modules, found: Mapping[str, Module], roles: Mapping[str, list[str]], loader: bytes) -> Iterable[str]:
    yield from [
        "## svsm's own modules",
        "",
        "| module | lines | bytes | SHA-256 | runs in |",
        "|---|---:|---:|---|---|",
    ]
    sources = {f"the loader (`svsm/kernel/{LOADER.name}`)": (loader, "all")}
    for name in sorted(name for name in found if name.partition(".")[0] == "svsm"):
        sources[f"`{name}`"] = (modules.source(found[name]), ", ".join(roles[name]))
    for name, (data, where) in sources.items():
        digest = hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]
        yield f"| {name} | {_lines(data)} | {len(data)} | `{digest}` | {where} |"
    everything = [data for data, _ in sources.values()]
    yield f"| **total: {len(everything)}** | **{sum(map(_lines, everything))}** | **{sum(map(len, everything))}** | | |"


def _lines(data: bytes) -> int:
    return data.count(b"\n")


def _packages(modules: Modules, found: Mapping[str, Module]) -> Iterable[str]:
    sizes: dict[str, _Size] = {}
    for name, module in found.items():
        package = _package(name)
        if package != "svsm" and not module.standard and module.kind == "source":
            size = sizes.setdefault(package, _Size())
            size.modules += 1
            size.size_bytes += len(modules.source(module))
    yield from ["| package | version | modules | bytes of source |", "|---|---|---:|---:|"]
    for package, size in sorted(sizes.items()):
        yield f"| {package} | {_version(package)} | {size.modules} | {size.size_bytes} |"


def _package(module: str) -> str:
    top = module.partition(".")[0]
    return _PACKAGES.get(top, top)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _objects(payload: Payload) -> Iterable[str]:
    manifest = payload.manifest
    imported = {load.name: load.module for role in manifest.roles.values() for load in role.loads if load.module}
    with zipfile.ZipFile(io.BytesIO(payload.archive)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    yield from ["| shared object | from | bytes |", "|---|---|---:|"]
    for name in sorted(manifest.objects):
        short = name.removeprefix("native/")
        if name in imported:
            package = _package(imported[name])
            yield f"| `{short}` | {package} {_version(package)} | {sizes[name]} |"
        elif short in _DISTRIBUTION or ".so" in short:
            yield f"| `{short}` | the distribution: {_DISTRIBUTION.get(short, 'its own package')} | |"
        else:
            yield f"| `{short}` | svsm | {sizes[name]} |"


def _standard(manifest: Manifest) -> Iterable[str]:
    yield f"{len(manifest.sources)} standard library modules have their code in the payload"
    yield from ["(their sources are checked by hash at start):", ""]
    yield ", ".join(f"`{name}`" for name in sorted(manifest.sources)) + "."
    yield from ["", "## Outside the payload, checked by hash at start", ""]
    yield f"The interpreter binary and libpython, the C library's objects, and {len(manifest.extensions)} compiled"
    yield from ["standard modules with what they link to:", ""]
    yield ", ".join(f"`{name}`" for name in sorted(manifest.extensions)) + "."


def versions(manifest: Manifest) -> dict[str, str]:
    """What the objects that the manifest names by hash are called on this machine; a name only, never a check.

    Returns:
        Name to version: ``libc`` as it says itself, packages and Python, every shared object by its Debian package
        where dpkg knows it, else by its file's name.
    """
    found = {"python": manifest.python.partition(" ")[0], "libc": os.confstr("CS_GNU_LIBC_VERSION") or "unknown"}
    for package in ("cffi", "cryptography", "pycparser"):
        found[package] = _version(package)
    objects = {name.removeprefix("native/"): digest for name, digest in manifest.objects.items()}
    for name, digest in sorted({**manifest.libraries, **objects}.items()):
        try:
            path = find_library(name, (), "")
        except BackendError:
            continue  # a package's, or the interpreter's own: their versions are above
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest:
            found[name] = _debian(path) or os.path.basename(os.path.realpath(path))
    return found


def _debian(path: str) -> str | None:
    for known in dict.fromkeys([path, os.path.realpath(path), path.removeprefix("/usr")]):
        package = _ask(["dpkg-query", "--search", known]).partition(": ")[0]
        if package:
            return _ask(["dpkg-query", "--show", "--showformat=${Package} ${Version}", package.split(",")[0]]) or None
    return None


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
