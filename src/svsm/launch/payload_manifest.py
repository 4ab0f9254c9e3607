# SPDX-License-Identifier: MIT OR Apache-2.0
"""The manifest inside the payload: which interpreter, standard library and libc play the CPU, by hash.

Plain lines of words separated by one space, because the loader reads it before any module is loaded:

    svsm-payload 1
    python 3.11.7 (main, ...) [GCC ...]
    interpreter SHA256
    library NAME SHA256               a file that may be mapped executable, by the base name of its real path
    source MODULE PATH SHA256         a standard library module; PATH is relative to the standard library
    extension MODULE PATH SHA256      the same, compiled
    object ARCHIVE-NAME SHA256        a shared object in the payload
    role NAME ENTRY                   what follows, up to the next role, is what this role uses, in this order
    uses source|extension MODULE
    load ARCHIVE-NAME [MODULE]        dlopen, or import as MODULE
"""

from __future__ import annotations

import dataclasses
import re

from svsm.formats.errors import FormatError

__all__ = ["Listed", "Load", "Manifest", "RoleManifest"]

_FIRST_LINE = "svsm-payload 1"
_WORD = re.compile(r"[!-~]+\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """A file outside the payload that is checked at start."""

    path: str
    """Relative to the standard library; a base name for libraries."""
    sha256: str
    """64 lower-case hex digits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """A shared object of the payload, loaded from a sealed memfd."""

    name: str
    """Its name in the archive."""
    module: str | None = None
    """The module that it is, or None for a library."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoleManifest:
    """What one role of the payload uses."""

    entry: str
    """``module:function``."""
    sources: tuple[str, ...]
    extensions: tuple[str, ...]
    loads: tuple[Load, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """The environment that an image was built for, and the roles in it."""

    python: str
    interpreter: str
    libraries: dict[str, str]
    """Base name to SHA-256."""
    sources: dict[str, Listed]
    extensions: dict[str, Listed]
    objects: dict[str, str]
    """Archive name to SHA-256."""
    roles: dict[str, RoleManifest]

    def pack(self) -> bytes:
        """The manifest's lines, UTF-8; sorted, except for the order of loads.

        Raises:
            FormatError: ``payload-manifest`` when a name has a space or is not ASCII.
        """
        lines = [_FIRST_LINE, f"python {self.python}", f"interpreter {self.interpreter}"]
        lines += [_line("library", name, digest) for name, digest in sorted(self.libraries.items())]
        lines += [_line("source", name, item.path, item.sha256) for name, item in sorted(self.sources.items())]
        lines += [_line("extension", name, item.path, item.sha256) for name, item in sorted(self.extensions.items())]
        lines += [_line("object", name, digest) for name, digest in sorted(self.objects.items())]
        for name, role in sorted(self.roles.items()):
            lines.append(_line("role", name, role.entry))
            lines += [_line("uses", "source", module) for module in sorted(role.sources)]
            lines += [_line("uses", "extension", module) for module in sorted(role.extensions)]
            lines += [_line("load", load.name, *([load.module] if load.module else [])) for load in role.loads]
        return ("\n".join(lines) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a packed manifest.

        Raises:
            FormatError: ``payload-manifest``.
        """
        try:
            lines = data.decode().split("\n")
        except UnicodeDecodeError as error:
            raise _bad("is not UTF-8") from error
        if len(lines) < 4 or lines[0] != _FIRST_LINE or lines[-1] != "" or not lines[1].startswith("python "):
            raise _bad("has another version or is cut short")
        reader = _Reader(python=lines[1].removeprefix("python "))
        for line in lines[2:-1]:
            reader.take(line.split(" "))
        manifest = reader.finish()
        if manifest.pack() != data:
            raise _bad("is not in its canonical order")
        return manifest


def _bad(what: str) -> FormatError:
    return FormatError(f"the payload's manifest {what}", code="payload-manifest")


def _line(*words: str) -> str:
    if not all(_WORD.match(word) for word in words):
        raise _bad("can't hold a name with spaces")
    return " ".join(words)


class _Reader:
    """Collects lines; a role's lines follow its `role` line."""

    def __init__(self, *, python: str) -> None:
        self.python = python
        self.interpreter = ""
        self.libraries: dict[str, str] = {}
        self.sources: dict[str, Listed] = {}
        self.extensions: dict[str, Listed] = {}
        self.objects: dict[str, str] = {}
        self.roles: dict[str, RoleManifest] = {}
        self.role: str | None = None

    def take(self, words: list[str]) -> None:
        match words:
            case ["interpreter", digest] if _SHA256.match(digest) and not self.interpreter:
                self.interpreter = digest
            case ["library", name, digest] if _SHA256.match(digest):
                self.libraries[name] = digest
            case ["source", module, path, digest] if _SHA256.match(digest):
                self.sources[module] = Listed(path, digest)
            case ["extension", module, path, digest] if _SHA256.match(digest):
                self.extensions[module] = Listed(path, digest)
            case ["object", name, digest] if _SHA256.match(digest):
                self.objects[name] = digest
            case ["role", name, entry] if name not in self.roles:
                self.role = name
                self.roles[name] = RoleManifest(entry, (), (), ())
            case _:
                self._take_of_role(words)

    def _take_of_role(self, words: list[str]) -> None:
        if self.role is None:
            raise _bad("has a line that is not known")
        role = self.roles[self.role]
        match words:
            case ["uses", "source", module] if module in self.sources:
                role = dataclasses.replace(role, sources=(*role.sources, module))
            case ["uses", "extension", module] if module in self.extensions:
                role = dataclasses.replace(role, extensions=(*role.extensions, module))
            case ["load", name] if name in self.objects:
                role = dataclasses.replace(role, loads=(*role.loads, Load(name)))
            case ["load", name, module] if name in self.objects:
                role = dataclasses.replace(role, loads=(*role.loads, Load(name, module)))
            case _:
                raise _bad("has a line that is not known")
        self.roles[self.role] = role

    def finish(self) -> Manifest:
        return Manifest(
            self.python,
            self.interpreter,
            self.libraries,
            self.sources,
            self.extensions,
            self.objects,
            self.roles,
        )
