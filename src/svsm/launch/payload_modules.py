# SPDX-License-Identifier: MIT OR Apache-2.0
"""Finding, reading and compiling the modules of the payload, without importing any of them.

The import closure is static: imports are read from the syntax tree. svsm's own modules count with every import they
contain (inside functions too); of the standard library and the third-party packages only what runs at import time
counts, plus `_HIDDEN`, which names what compiled or lazy code asks for by itself. Blocks under `TYPE_CHECKING`, and for
running a module as a program, do not count. That way a change in a module that the kernel doesn't use cannot change
a launch digest.

Compiled code has to be the same bytes wherever it is compiled: the file name in it is `payload:...`, and it is
marshalled in format 2, which has no back references (those depend on reference counts) and sorts sets.

Compiling everything takes about half a second, so results are kept in a cache file, by SHA-256 of name, source,
interpreter and this file. Whoever can write it can also write the sources; damage is found by its checksum and ignored.
"""

from __future__ import annotations

import _imp
import ast
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import marshal
import os
import sys
from collections.abc import Iterator, Sequence

from svsm.formats.errors import BackendError, FormatError

__all__ = ["Module", "ModuleCache", "Modules", "default_cache"]

_THIRD_PARTY = ("cryptography", "cffi", "pycparser", "_cffi_backend")
_BLOCKED = ("_ssl",)
_PRIMITIVES = "cryptography.hazmat.primitives"
_HIDDEN: dict[str, tuple[str, ...]] = {
    "cryptography.hazmat.bindings._rust": (
        "_cffi_backend",
        "abc",
        "cryptography.exceptions",
        "cryptography.utils",
        "cryptography.hazmat._oid",
        "cryptography.hazmat.decrepit.ciphers.algorithms",
        "cryptography.hazmat.decrepit.ciphers.modes",
        *(f"{_PRIMITIVES}.{name}" for name in ("_serialization", "ciphers", "hashes", "serialization")),
        *(f"{_PRIMITIVES}.ciphers.{name}" for name in ("algorithms", "modes")),
        *(
            f"{_PRIMITIVES}.asymmetric.{name}"
            for name in ["dh", "dsa", "ec", "ed25519", "ed448", "padding", "rsa", "utils", "x25519", "x448"]
        ),
        "warnings",
    ),
    f"{_PRIMITIVES}.asymmetric.ec": ("cryptography.hazmat.backends.openssl.backend",),
    "cffi.api": ("cffi.cparser", "_cffi_backend"),
    "hashlib": ("_md5", "_sha1", "_sha256", "_sha512", "_blake2", "_sha3"),
    "traceback": ("linecache",),
}

_CACHE_MAGIC = b"svsm payload cache 1\n"
_CACHE_LIMIT_BYTES = 64 << 20

_LISTINGS: dict[str, frozenset[str]] = {}

Import = tuple[str, tuple[str, ...]]
Record = tuple[tuple[Import, ...], tuple[Import, ...], bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A module that was found."""

    name: str
    path: str
    """Where it is on the build machine; "" for one that the interpreter carries in itself."""
    relative: str
    """Its path below the root it was found in, with slashes."""
    kind: str
    """``source``, ``extension`` or ``inside`` (built in, or frozen into the interpreter)."""
    standard: bool
    """Whether it belongs to the standard library."""
    package: bool


class _Imports(ast.NodeVisitor):
    """Collects imports: `top` runs at import time, `deep` inside functions."""

    def __init__(self, name: str, *, package: bool) -> None:
        self.anchor = name.split(".") if package else name.split(".")[:-1]
        self.top: list[Import] = []
        self.deep: list[Import] = []
        self.depth = 0

    def _add(self, module: str, names: tuple[str, ...] = ()) -> None:
        (self.deep if self.depth else self.top).append((module, names))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.anchor[: len(self.anchor) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        self._add(module, tuple(alias.name for alias in node.names))

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
        never = name == "TYPE_CHECKING" or _is_main(test)
        for child in node.orelse if never else [*node.body, *node.orelse]:
            self.visit(child)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
            self._add(first.value)
        self.generic_visit(node)

    def _function(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function  # noqa: N815


def _is_main(test: ast.expr) -> bool:
    """Whether a condition is ``__name__ == "__main__"``: code for who runs the module as a program."""
    left = test.left if isinstance(test, ast.Compare) else None
    return isinstance(left, ast.Name) and left.id == "__name__"


def default_cache() -> str | None:
    """Where compiled code is kept: ``$XDG_CACHE_HOME/svsm`` or ``~/.cache/svsm``; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "svsm", f"payload-{sys.implementation.cache_tag}.bin") if os.path.isabs(base) else None


class ModuleCache:
    """Imports and code of sources seen before, by content."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        with open(__file__, "rb") as own:
            # What this file makes of a source is part of the result.
            self._maker = hashlib.sha256(own.read()).digest()
        self._old: dict[bytes, Record] = {}
        self._new: dict[bytes, Record] = {}
        if path is not None:
            self._load(path)

    def _load(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022 or status.st_size > _CACHE_LIMIT_BYTES:
                return
            data = file.read()
        start = len(_CACHE_MAGIC) + 32
        if data[: len(_CACHE_MAGIC)] != _CACHE_MAGIC:
            return
        if hashlib.sha256(data[start:]).digest() == data[len(_CACHE_MAGIC) : start]:
            self._old = marshal.loads(data[start:])

    @property
    def records(self) -> int:
        """How many modules were found in the file."""
        return len(self._old)

    def record(self, module: Module, source: bytes) -> Record:
        """Imports at the top, imports in functions, and the compiled code as .pyc bytes."""
        key = hashlib.sha256(
            b"\0".join([self._maker, sys.version.encode(), module.name.encode(), module.relative.encode(), source])
        ).digest()
        found = self._new.get(key) or self._old.get(key) or _compile(module, source)
        self._new[key] = found
        return found

    def save(self) -> None:
        """Write what this build used, if something in it is new; failing to is not an error."""
        if self._path is None or self._new.keys() <= self._old.keys():
            return
        body = marshal.dumps({**self._old, **self._new} if len(self._old) < 2 * len(self._new) + 400 else self._new)
        temporary = f"{self._path}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(_CACHE_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, self._path)
        except OSError:
            return


def _compile(module: Module, source: bytes) -> Record:
    try:
        tree = ast.parse(source)
        code = compile(source, f"payload:{module.relative}", "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise FormatError(
            "a module of the payload can't be compiled", code="payload-module", module=module.name
        ) from error
    imports = _Imports(module.name, package=module.package)
    imports.visit(tree)
    # A .pyc with an unchecked hash of its source (PEP 552): any change of the source shows, a comment's too.
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    return tuple(imports.top), tuple(imports.deep), header + marshal.dumps(code, 2)


class Modules:
    """Looks modules up in svsm's own folder, the standard library and the third-party packages."""

    def __init__(self, roots: Sequence[str], cache: ModuleCache) -> None:
        """`roots` are folders with svsm's (or a test's) own packages."""
        self._own = tuple(roots)
        self._standard = os.path.dirname(os.__file__)
        self._other = tuple(entry for entry in sys.path if entry and os.path.isdir(entry) and entry != self._standard)
        self._cache = cache
        _LISTINGS.clear()
        self._records: dict[str, Record] = {}
        self._found: dict[str, Module | None] = {}
        self._sources: dict[str, bytes] = {}

    def find(self, name: str) -> Module | None:
        """The module of that name, or None when there is none (an optional import)."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Module | None:
        top = name.partition(".")[0]
        if name in _BLOCKED:
            return None
        if name in sys.builtin_module_names:
            return Module(name, "", "", "inside", True, False)
        if top in sys.stdlib_module_names:
            return self._find_standard(name)
        roots = self._other if top in _THIRD_PARTY else self._own
        for root in roots:
            found = _in_root(name, root, standard=False)
            if found is not None:
                return found
        return None

    def _find_standard(self, name: str) -> Module | None:
        for below in ("", "lib-dynload/"):
            found = _in_root(name, os.path.join(self._standard, below), standard=True)
            if found is not None:
                found = dataclasses.replace(found, relative=below + found.relative)
                return dataclasses.replace(found, kind="inside") if _imp.is_frozen(name) else found
        return None

    def source(self, module: Module) -> bytes:
        """The module's file."""
        if module.name not in self._sources:
            try:
                with open(module.path, "rb") as file:
                    self._sources[module.name] = file.read()
            except OSError as error:
                raise BackendError("a module can't be read", code="payload-module", module=module.name) from error
        return self._sources[module.name]

    def code(self, module: Module) -> bytes:
        """The compiled module, as the bytes of a .pyc file."""
        return self._record(module)[2]

    def _record(self, module: Module) -> Record:
        if module.name not in self._records:
            self._records[module.name] = self._cache.record(module, self.source(module))
        return self._records[module.name]

    def _available(self, name: str) -> bool:
        top = name.partition(".")[0]
        if top in (*_THIRD_PARTY, *sys.stdlib_module_names):
            return top in _THIRD_PARTY or self.find(top) is not None or top in _BLOCKED
        return self.find(name) is not None

    def _asked(self, module: Module) -> Iterator[str]:
        if module.path and not module.path.endswith(".so"):
            top, deep, _ = self._record(module)
            own = module.name.partition(".")[0] not in (*_THIRD_PARTY, *sys.stdlib_module_names)
            for name, parts in top + deep if own else top:
                if own and not self._available(name):
                    raise FormatError(
                        "a module of the payload imports something that is not part of it",
                        code="payload-import",
                        module=module.name,
                        imports=name,
                    )
                yield name
                yield from (f"{name}.{part}" for part in parts)
        yield from _HIDDEN.get(module.name, ())

    def closure(self, names: Sequence[str]) -> dict[str, Module]:
        """Every module that importing `names` needs, by name, sorted.

        Raises:
            FormatError: ``payload-import`` (not available to the payload), ``payload-module`` (does not compile).
        """
        reached: dict[str, Module] = {}
        pending = list(names)
        for name in names:
            if self.find(name) is None:
                raise FormatError("the payload's entry does not exist", code="payload-import", imports=name)
        while pending:
            name = pending.pop()
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                prefix = ".".join(parts[:length])
                module = None if prefix in reached else self.find(prefix)
                if module is not None:
                    reached[prefix] = module
                    pending.extend(self._asked(module))
        return dict(sorted(reached.items()))


def _in_root(name: str, root: str, *, standard: bool) -> Module | None:
    below = name.replace(".", "/")
    candidates = [(f"{below}/__init__.py", "source", True)]
    candidates += [(below + suffix, "extension", False) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    candidates.append((f"{below}.py", "source", False))
    for relative, kind, package in candidates:
        folder, _, file = relative.rpartition("/")
        if file in _listing(os.path.join(root, folder) if folder else root):
            return Module(name, f"{root.rstrip('/')}/{relative}", relative, kind, standard, package)
    return None


def _listing(folder: str) -> frozenset[str]:
    """The files in a folder that could be modules; asked once per build, a thousand times faster than stat."""
    found = _LISTINGS.get(folder)
    if found is None:
        try:
            found = frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
        except OSError:
            found = frozenset()
        _LISTINGS[folder] = found
    return found
