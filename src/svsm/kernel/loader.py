# SPDX-License-Identifier: MIT OR Apache-2.0
"""The measured loader: from a bare interpreter to the first line of the kernel or of a service.

Hardware runs this text, copied out of measured pages, as `python3 -I -S /proc/self/fd/N`. It imports nothing of
svsm until it serves imports itself. The order, and why:

 1. Take the start table out of the environment. The kernel copies the archive from guest memory into a sealed
    memfd: from here on nobody can change it. A service is given that memfd.
 2. Serve imports from the archive; the path finder goes. Python code now only comes from the payload.
 3. Load the compiled standard library modules that the manifest lists, and the payload's libcrypto before the one
    that would bind to the system's; then check every listed file's hash.
 4. No dumps, no privileges, Landlock deny-all, own uid. The file system is gone.
 5. Load the payload's shared objects from sealed memfds, dependencies first; map the callback slots.
 6. Check every executable mapping: the payload, or a listed file. libffi's writable code pages lose execution.
 7. seccomp. A `confined` line on the console is the mark: nothing is opened after it.
 8. Call the entry.

It refuses with one JSON line on the console and exit status 3.
"""

from __future__ import annotations

import _imp
import marshal
import os
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec
from types import CodeType, ModuleType

MFD_FLAGS = 0x0001 | 0x0002  # MFD_CLOEXEC, MFD_ALLOW_SEALING
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
ALL_SEALS = 1 | 2 | 4 | 8  # SEAL, SHRINK, GROW, WRITE
SEAL_TRIES = 16
EBUSY = 16
PYC_HEADER_BYTES = 16
MARK = "confined"
ARCHIVE_LIMIT_BYTES = 256 << 20
MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x02, 0x10, 0x20
SYS_MMAP, SYS_MPROTECT = 9, 10
READ, WRITE, EXEC = 1, 2, 4
SLOTS = "native/callback-slots"


class Refusal(Exception):
    """The start is refused; `code` is documented in svsm/cli/errors/confine.toml."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Start:
    """What hardware handed over, out of the environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.role = environment["SVSM_ROLE"]
        self.registers = {name: int(value, 16) for name, value in _pairs(environment.get("SVSM_REGISTERS", ""))}
        self.descriptors = {name: int(value) for name, value in _pairs(environment["SVSM_DESCRIPTORS"])}
        self.parent = int(environment["SVSM_PARENT"])
        self.uid = int(environment["SVSM_UID"]) if "SVSM_UID" in environment else None
        self.landlock_cap = int(environment["SVSM_LANDLOCK_CAP"]) if "SVSM_LANDLOCK_CAP" in environment else None
        prefix = "SVSM_PARAMETER_"
        self.parameters = {key[len(prefix) :]: value for key, value in environment.items() if key.startswith(prefix)}


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (part.partition("=") for part in text.split(",") if part)]


class Archive:
    """The payload: a stored zip in a sealed memfd, read with pread."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.members: dict[str, tuple[int, int]] = {}
        size = os.fstat(descriptor).st_size
        end = os.pread(descriptor, 22, max(0, size - 22))
        if len(end) != 22 or end[:4] != b"PK\x05\x06":
            raise Refusal("payload-archive", "the archive has no directory")
        count, length, start = _little(end, 10, 2), _little(end, 12, 4), _little(end, 16, 4)
        directory = os.pread(descriptor, length, start)
        position = 0
        for _ in range(count):
            header = directory[position : position + 46]
            if len(header) != 46 or header[:4] != b"PK\x01\x02" or header[10:12] != b"\0\0":
                raise Refusal("payload-archive", "the archive's directory is damaged")
            name_length, extra = _little(header, 28, 2), _little(header, 30, 2) + _little(header, 32, 2)
            name = directory[position + 46 : position + 46 + name_length].decode()
            self.members[name] = (_little(header, 42, 4) + 30 + name_length, _little(header, 24, 4))
            position += 46 + name_length + extra

    def read(self, name: str) -> bytes:
        """A member's bytes."""
        if name not in self.members:
            raise Refusal("payload-archive", f"the archive has no {name}")
        offset, length = self.members[name]
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise Refusal("payload-archive", f"{name} is cut short")
        return data

    def memfd(self, name: str) -> int:
        """A sealed memfd with a member's bytes."""
        if name not in self.members:
            raise Refusal("payload-archive", f"the archive has no {name}")
        return _sealed_copy(self.descriptor, *self.members[name], f"payload:{name}")


def _little(data: bytes, offset: int, length: int) -> int:
    return int.from_bytes(data[offset : offset + length], "little")


def _sealed_copy(source: int, offset: int, length: int, name: str) -> int:
    target = os.memfd_create(name, MFD_FLAGS)
    done = 0
    while done < length:
        copied = os.sendfile(target, source, offset + done, length - done)
        if copied <= 0:
            raise Refusal("payload-archive", f"{name} is cut short")
        done += copied
    _seal(target, name)
    return target


def _seal(descriptor: int, name: str) -> None:
    """Let nobody change a file of memory any more; see svsm.confine.sealing, which has to wait for the same."""
    import fcntl

    for _ in range(SEAL_TRIES):
        try:
            fcntl.fcntl(descriptor, F_ADD_SEALS, ALL_SEALS)
            return
        except OSError as error:
            if error.errno != EBUSY:
                raise
    raise Refusal("payload-archive", f"the system does not let {name} be sealed")


class Manifest:
    """The manifest's lines; svsm.launch.payload_manifest describes them."""

    def __init__(self, text: str, role: str) -> None:
        self.python = self.interpreter = self.entry = ""
        self.libraries: dict[str, str] = {}
        self.files: dict[tuple[str, str], tuple[str, str]] = {}
        self.uses: list[tuple[str, str]] = []
        self.loads: list[tuple[str, str | None]] = []
        current = ""
        for line in text.splitlines()[1:]:
            kind, _, rest = line.partition(" ")
            words = rest.split(" ")
            if kind in ("python", "interpreter"):
                setattr(self, kind, rest)
            elif kind == "library":
                self.libraries[words[0]] = words[1]
            elif kind in ("source", "extension"):
                self.files[kind, words[0]] = (words[1], words[2])
            elif kind == "role":
                current = words[0]
                self.entry = words[1] if current == role else self.entry
            elif kind == "uses" and current == role:
                self.uses.append((words[0], words[1]))
            elif kind == "load" and current == role:
                self.loads.append((words[0], words[1] if len(words) > 1 else None))
        if not self.entry:
            raise Refusal("payload-role", f"the payload has no role {role}")


class PayloadFinder:
    """Serves every import that is not built in or frozen; knows no other place than archive and manifest."""

    def __init__(self, archive: Archive, manifest: Manifest, standard: str) -> None:
        self.archive = archive
        self.standard = standard
        self.extensions = {name: path for (kind, name), (path, _) in manifest.files.items() if kind == "extension"}
        self.uses = {name for kind, name in manifest.uses if kind == "extension"}
        self.objects = {module: name for name, module in manifest.loads if module is not None}
        self.held: list[int] = []

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        below = "code/" + name.replace(".", "/")
        for member, package in ((f"{below}/__init__.pyc", True), (f"{below}.pyc", False)):
            if member in self.archive.members:
                spec = self._spec(name, f"payload:{member}", is_package=package)
                spec.has_location = True
                spec.loader_state = member
                return spec
        if name in self.objects:
            return self._spec(name, f"payload:{self.objects[name]}")
        if name in self.uses:
            return self._spec(name, f"{self.standard}/{self.extensions[name]}")
        return None

    def _spec(self, name: str, origin: str, *, is_package: bool = False) -> ModuleSpec:
        return ModuleSpec(name, self, origin=origin, is_package=is_package)  # type: ignore[arg-type]  # no importlib.abc

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.loader_state is not None:
            return None
        place = spec.origin or ""
        if spec.name in self.objects:
            # The number stays taken: the dynamic linker knows an object by the path it was loaded from.
            descriptor = self.archive.memfd(self.objects[spec.name])
            self.held.append(descriptor)
            place = f"/proc/self/fd/{descriptor}"
        return _imp.create_dynamic(self._spec(spec.name, place))

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is None or spec.loader_state is None:
            _imp.exec_dynamic(module)
            return
        exec(self._code(spec.loader_state), module.__dict__)  # noqa: S102 - this is what an import is

    def _code(self, member: str) -> CodeType:
        code = marshal.loads(memoryview(self.archive.read(member))[PYC_HEADER_BYTES:])
        if not isinstance(code, CodeType):
            raise Refusal("payload-archive", f"{member} is not code")
        return code

    def get_code(self, name: str) -> CodeType | None:
        """For runpy and inspect."""
        spec = self.find_spec(name)
        return self._code(spec.loader_state) if spec is not None and spec.loader_state is not None else None

    def get_source(self, name: str) -> str | None:
        """There is no source here; tracebacks show file and line only."""
        return None


def _take_archive(start: Start) -> int:
    """Step 1: a sealed memfd with the archive."""
    import fcntl

    if "archive" in start.descriptors:
        descriptor = start.descriptors["archive"]
        if fcntl.fcntl(descriptor, F_GET_SEALS) & ALL_SEALS != ALL_SEALS:
            raise Refusal("payload-archive", "the archive is not sealed")
        return descriptor
    length = start.registers["r8"]
    if not 0 < length <= ARCHIVE_LIMIT_BYTES:
        raise Refusal("payload-archive", "the archive's length is out of range")
    return _sealed_copy(start.descriptors["private"], start.registers["rdx"], length, "payload:archive")


def _serve_imports(archive: Archive, manifest: Manifest) -> PayloadFinder:
    """Step 2."""
    finder = PayloadFinder(archive, manifest, os.path.dirname(os.__file__))
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, finder]
    sys.path[:] = []
    sys.path_hooks[:] = []
    sys.path_importer_cache.clear()
    return finder


def _load_library(archive: Archive, finder: PayloadFinder, name: str) -> None:
    import _ctypes

    descriptor = archive.memfd(name)
    finder.held.append(descriptor)
    _ctypes.dlopen(f"/proc/self/fd/{descriptor}", os.RTLD_NOW | os.RTLD_LOCAL)


def _load_environment(archive: Archive, manifest: Manifest, finder: PayloadFinder) -> None:
    """Step 3: everything that comes from the file system, and libcrypto before what wants it."""
    modules = [name for kind, name in manifest.uses if kind == "extension"]
    for name in modules:
        if name != "_hashlib":
            __import__(name)
    if "_hashlib" in modules:
        import ctypes

        name = ""
        while name != "native/libcrypto.so.3":  # after what it needs, or the file system's would be mapped
            name, _ = manifest.loads.pop(0)
            _load_library(archive, finder, name)
        held = ctypes.CDLL(f"/proc/self/fd/{finder.held[-1]}")
        held.OPENSSL_init_crypto(ctypes.c_uint64(0x80), None)  # NO_LOAD_CONFIG: openssl.cnf is not measured
        __import__("_hashlib")
    # What libc loads by name on demand must be there before the file system goes.
    import ctypes

    for soname in ("libpthread.so.0", "libm.so.6", "libdl.so.2", "librt.so.1"):
        if any(listed == soname for listed in manifest.libraries):
            ctypes.CDLL(soname)


def _sha256(path: str) -> str:
    if "_hashlib" in sys.modules:
        digest = sys.modules["_hashlib"].openssl_sha256()
    else:
        digest = __import__("_sha256").sha256()
    buffer = memoryview(bytearray(1 << 18))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return "missing"
    try:
        while length := os.readv(descriptor, [buffer]):
            digest.update(buffer[:length])
    finally:
        os.close(descriptor)
    return str(digest.hexdigest())


def _check_environment(manifest: Manifest, finder: PayloadFinder) -> set[str]:
    """Step 3: hashes of interpreter, libraries, modules. Returns the paths that may be mapped executable."""
    changed: list[str] = []
    if " ".join(sys.version.split()) != manifest.python:
        changed.append("python")
    if _sha256("/proc/self/exe") != manifest.interpreter:
        changed.append("interpreter")
    for use in manifest.uses:
        path, digest = manifest.files[use]
        if _sha256(f"{finder.standard}/{path}") != digest:
            changed.append(path)
    listed = {os.readlink("/proc/self/exe")}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for path in _executable(maps.read()):
            digest = manifest.libraries.get(os.path.basename(path), "")
            if digest and _sha256(path) == digest:
                listed.add(path)
            elif path.startswith("/") and not path.startswith("/memfd:payload:") and path not in listed:
                changed.append(path)
    listed |= {os.path.realpath(f"{finder.standard}/{finder.extensions[name]}") for name in finder.uses}
    changed = [path for path in changed if path not in listed]
    if changed:
        raise Refusal("payload-environment-changed", "changed since the image was built: " + ", ".join(changed[:8]))
    return listed


def _executable(maps: str) -> dict[str, list[tuple[int, int]]]:
    """Executable mappings by path ("" for anonymous memory)."""
    found: dict[str, list[tuple[int, int]]] = {}
    for line in maps.splitlines():
        fields = line.split(None, 5)
        if fields[1][2] == "x":
            first, _, last = fields[0].partition("-")
            found.setdefault(fields[5] if len(fields) > 5 else "", []).append((int(first, 16), int(last, 16)))
    return found


def _load_payload_objects(archive: Archive, manifest: Manifest, finder: PayloadFinder) -> None:
    """Step 5: what step 3 has left."""
    for name, module in manifest.loads:
        if module is not None:
            __import__(module)
        else:
            _load_library(archive, finder, name)
    if "_cffi_backend" in sys.modules:
        backend = sys.modules["_cffi_backend"]
        ffi = backend.FFI()
        # Makes cffi map its pool of closures now; afterwards no memory becomes executable any more.
        ffi.callback("int(int)", abs)
    from svsm.confine import callbacks, libc

    code = archive.memfd(SLOTS)
    base = libc.syscall(SYS_MMAP, 0, 8192, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if (
        libc.syscall(SYS_MMAP, base, 4096, READ | EXEC, MAP_PRIVATE | MAP_FIXED, code, 0) != base
        or libc.syscall(SYS_MMAP, base + 4096, 4096, READ | WRITE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0) < 0
    ):
        raise Refusal("payload-mapping", "the callback slots can't be mapped")
    os.close(code)
    callbacks.install(base)


def _check_mappings(maps: int, listed: set[str]) -> None:
    """Step 6. `maps` is a descriptor of /proc/self/maps, opened while files could be opened."""
    from svsm.confine import libc

    for attempt in (1, 2):
        os.lseek(maps, 0, os.SEEK_SET)
        text = b""
        while chunk := os.read(maps, 1 << 16):
            text += chunk
        for path, ranges in _executable(text.decode()).items():
            if path in listed or path in ("[vdso]", "[vsyscall]") or path.startswith("/memfd:payload:"):
                continue
            if attempt == 2 or path:
                raise Refusal("payload-mapping", f"executable memory that is not listed: {path or 'anonymous'}")
            for first, last in ranges:
                libc.syscall(SYS_MPROTECT, first, last - first, READ | WRITE)
    os.close(maps)


def _check_modules(finder: PayloadFinder) -> None:
    """Step 6: where every loaded module came from; what the interpreter itself loaded before us is listed too."""
    listed = {f"{finder.standard}/{path}" for path in finder.extensions.values()}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        if name == "__main__" or origin in ("built-in", "frozen") or origin in listed:
            continue
        if isinstance(origin, str) and origin.startswith("payload:"):
            continue
        if isinstance(origin, str) and finder.find_spec(name) is not None:
            continue  # encodings and its like, read before this text ran; the source's hash was checked
        if spec is None and not hasattr(module, "__file__"):
            continue  # made by code of the payload: typing.io, the inner modules of _rust
        raise Refusal("payload-mapping", f"module {name} comes from {origin}")


def _say(console: int | None, **members: object) -> None:
    import json

    if console is not None:
        try:
            os.write(console, json.dumps(members, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        except OSError:
            return  # nobody reads the console, or nobody is left: that must not keep a process from starting


def _confine_and_run(start: Start, archive: Archive, manifest: Manifest, finder: PayloadFinder) -> int:
    """Steps 4 to 8."""
    listed = _check_environment(manifest, finder)
    maps = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    from svsm.confine import filter as seccomp
    from svsm.confine import landlock, process
    from svsm.confine.context import ProcessContext
    from svsm.confine.lists import Role

    role = Role.KERNEL if start.role == "kernel" else Role.SERVICE
    process.harden()
    process.bind_to_parent(start.parent)
    ruleset = landlock.prepare(cap=start.landlock_cap)
    process.drop(start.uid, parent=start.parent)
    ruleset.enforce()
    _load_payload_objects(archive, manifest, finder)
    _check_mappings(maps, listed)
    _check_modules(finder)
    for descriptor in finder.held:
        os.close(descriptor)
    seccomp.install(role)
    isolation = process.report(role, own_uid=start.uid is not None, landlock_abi=ruleset.abi)
    context = ProcessContext(
        start.role, start.registers, start.descriptors, start.parameters, archive.descriptor, isolation
    )
    _say(start.descriptors.get("console"), event=MARK, role=start.role, isolation=isolation.as_json())
    module, _, function = manifest.entry.partition(":")
    __import__(module)
    answer = getattr(sys.modules[module], function)(context)
    return answer if isinstance(answer, int) else 0


def _main() -> int:
    environment = dict(os.environ)
    os.environ.clear()
    console: int | None = None
    try:
        start = Start(environment)
        console = start.descriptors.get("console")
        archive = Archive(_take_archive(start))
        manifest = Manifest(archive.read("manifest").decode(), start.role)
        finder = _serve_imports(archive, manifest)
        _load_environment(archive, manifest, finder)
        return _confine_and_run(start, archive, manifest, finder)
    except Refusal as refusal:
        _say(console, event="refused", code=refusal.code, message=refusal.detail)
        return 3
    except Exception as error:
        return _failed(console, error)


def _failed(console: int | None, error: Exception) -> int:
    """Report an error of the entry: its kind and place; the message only where it can't hold a secret."""
    import traceback

    code = getattr(error, "code", None)
    known = isinstance(code, str)
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    _say(
        console,
        event="failed",
        code=code if known else "internal",
        error=type(error).__name__,
        message=str(error) if known or isinstance(error, ImportError) else "",
        places=places[-12:],
    )
    status = getattr(error, "exit_code", 1)
    return status if isinstance(status, int) else 1


if __name__ == "__main__":
    _status = _main()
    os._exit(_status)
