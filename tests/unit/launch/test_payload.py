# SPDX-License-Identifier: MIT OR Apache-2.0
"""The measured payload: reproducible, complete, and no more than what is used."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import marshal
import os
import random
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.cli.main import main
from svsm.cli.supervisor.release import Release
from svsm.formats.errors import BackendError, FormatError, SvsmError
from svsm.formats.igvm import IgvmFile
from svsm.formats.settings import Settings
from svsm.launch import payload as payload_module
from svsm.launch.build import build_image
from svsm.launch.digest import payload_digest
from svsm.launch.payload import Payload, build_payload
from svsm.launch.payload_elf import find_library, read_elf
from svsm.launch.payload_manifest import Manifest
from svsm.launch.payload_modules import Module, ModuleCache, Modules
from svsm.launch.payload_tcb import COMMAND, tcb_table, versions

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def built() -> Payload:
    return build_payload()


def members(payload: Payload) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(payload.archive)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def test_the_archive_says_nothing_about_its_builder(built: Payload) -> None:
    with zipfile.ZipFile(io.BytesIO(built.archive)) as archive:
        infos = archive.infolist()
        assert [info.filename for info in infos] == sorted(info.filename for info in infos)
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
        assert {(info.extra, info.comment, info.external_attr) for info in infos} == {(b"", b"", 0o100444 << 16)}
    libraries = [f"{prefix}/lib/python" for prefix in (sys.prefix, sys.base_prefix)]
    for path in (str(ROOT), *libraries, os.path.expanduser("~") + "/"):
        mine = [name for name, data in members(built).items() if name.startswith("code/") and path.encode() in data]
        assert mine == [], path


def test_code_names_the_payload_not_the_machine(built: Payload) -> None:
    def names(code: types.CodeType) -> Iterator[str]:
        yield code.co_filename
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from names(constant)

    for name, data in members(built).items():
        if name.startswith("code/"):
            assert set(names(marshal.loads(data[16:]))) == {f"payload:{name[5:-1]}"}


def test_manifest_round_trip(built: Payload) -> None:
    packed = members(built)["manifest"]
    assert Manifest.parse(packed) == built.manifest
    assert built.manifest.pack() == packed
    assert built.manifest.interpreter == hashlib.sha256(Path("/proc/self/exe").read_bytes()).hexdigest()
    for name, digest in built.manifest.objects.items():
        assert hashlib.sha256(members(built)[name]).hexdigest() == digest


def parsed(data: bytes) -> Manifest | str:
    """The manifest, or the code of the error; nothing else may come out."""
    try:
        return Manifest.parse(data)
    except SvsmError as error:
        return error.code


def test_any_damage_to_a_manifest_is_an_error_or_another_manifest(built: Payload) -> None:
    packed = built.manifest.pack()
    generator = random.Random(1)
    for _ in range(60):
        damaged = bytearray(packed)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        assert parsed(bytes(damaged)) != built.manifest
    for cut in [0, 1, 5, 20, *(generator.randrange(len(packed)) for _ in range(40))]:
        assert parsed(packed[:cut]) != built.manifest


def test_what_the_kernel_does_not_use_is_not_in_it(built: Payload) -> None:
    inside = {name[5:-4] for name in members(built) if name.startswith("code/svsm/")}
    for room in ("hardware", "host", "broker", "launch", "cli", "fuzz", "testing"):
        assert not [name for name in inside if name.startswith(f"svsm/{room}")], room
    assert {"svsm/kernel/boot", "svsm/services/vtpm/__init__", "svsm/confine/filter"} <= inside
    service = built.manifest.roles["vtpm"]
    assert not [load for load in service.loads if "rust" in load.name]
    assert not [name for name in ("_ssl", "ssl") if name in built.manifest.extensions or name in built.manifest.sources]


SETTINGS: list[dict[str, str]] = [
    {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "1"},
    {"TZ": "America/New_York", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "77", "PYTHONOPTIMIZE": "2", "HOME": "/nowhere"},
]


def build_elsewhere(folder: Path, settings: dict[str, str], *, umask: int, uid: int | None) -> str:
    """SHA-256 of loader and archive, built from `folder` by another process, without a cache."""
    script = (
        f"import os; os.umask({umask}); uid = {uid}\n"
        "import hashlib, svsm\n"
        "from svsm.launch import payload\n"
        f"assert svsm.__file__.startswith({str(folder)!r}), svsm.__file__\n"
        "if uid: os.setgid(uid); os.setuid(uid)\n"
        "p = payload.build_payload(cache=None)\n"
        "print(hashlib.sha256(p.loader + p.archive).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), **settings}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def digest(payload: Payload) -> str:
    return hashlib.sha256(payload.loader + payload.archive).hexdigest()


@pytest.mark.parametrize(
    "settings", [SETTINGS[1], pytest.param(SETTINGS[0], marks=pytest.mark.long)], ids=["east", "west"]
)
def test_the_same_bytes_from_elsewhere(built: Payload, tmp_path: Path, settings: dict[str, str]) -> None:
    copy = tmp_path / "a folder with spaces"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for source in copy.rglob("*.py"):
        os.utime(source, (1, 1))
        source.chmod(0o600)
    assert build_elsewhere(copy, settings, umask=0o077, uid=None) == digest(build_payload(cache=None))


@pytest.mark.long
def test_the_same_bytes_from_sdist_and_wheel(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("src", "pyproject.toml", "README.md", "LICENSE-MIT", "LICENSE-APACHE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, tree / name)
        else:
            (tree / name).write_text("not written yet\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    expected = digest(build_payload(cache=None))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    assert build_elsewhere(tmp_path / "wheel", {}, umask=0o022, uid=None) == expected
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    assert build_elsewhere(unpacked / "src", {}, umask=0o022, uid=None) == expected


def test_a_changed_docstring_byte_changes_the_archive(built: Payload, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    boot = tmp_path / "src" / "svsm" / "kernel" / "boot.py"
    text = boot.read_text()
    assert '"""The kernel' in text
    boot.write_text(text.replace('"""The kernel', '"""The Kernel', 1))
    assert build_elsewhere(tmp_path / "src", {}, umask=0o022, uid=None) != digest(built)


@pytest.mark.long
def test_an_unused_module_does_not_change_the_archive(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    parser = tmp_path / "src" / "svsm" / "formats" / "ovmf.py"
    parser.write_text(parser.read_text() + "\nFIXED = True\n")
    assert build_elsewhere(tmp_path / "src", {}, umask=0o022, uid=None) == digest(build_payload(cache=None))


def package(folder: Path, **modules: str) -> Modules:
    for name, text in modules.items():
        path = folder / f"{name.replace('_in_', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Modules([str(folder)], ModuleCache(None))


def test_closure_follows_what_runs(tmp_path: Path) -> None:
    modules = package(
        tmp_path,
        toy="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import decimal\nelse:\n    import bisect\n"
        "def later():\n    from helper import one\n    import importlib\n    importlib.import_module('helper.two')\n",
        helper_in___init__="",
        helper_in_one="from . import three\n",
        helper_in_two="import os.path\n",
        helper_in_three="",
        helper_in_four="",
    )
    found = set(modules.closure(["toy"]))
    assert {"toy", "helper", "helper.one", "helper.two", "helper.three", "bisect", "_bisect", "typing"} <= found
    assert not {"decimal", "helper.four"} & found


@pytest.mark.parametrize(
    "text", ["import h11\n", "import nothing_of_the_kind\n", "from toy2 import x\n", "import pip\n"]
)
def test_what_may_not_be_in_a_payload_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(FormatError) as caught:
        package(tmp_path, toy=text).closure(["toy"])
    assert caught.value.code == "payload-import"
    assert caught.value.details["module"] == "toy"


def test_code_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    for text in ("def (:\n", "x = '\0'\n"):
        with pytest.raises(FormatError) as caught:
            package(tmp_path, toy=text).closure(["toy"])
        assert caught.value.code == "payload-module"


def test_the_cache_changes_nothing_and_damage_is_ignored(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "code.bin"
    first = build_payload(cache=str(cache)).archive
    assert cache.stat().st_mode & 0o777 == 0o600
    assert build_payload(cache=str(cache)).archive == first
    for offset in (0, 30, 60, 4000, -1):
        damaged = bytearray(cache.read_bytes())
        damaged[offset] ^= 0x40
        cache.write_bytes(damaged)
        assert ModuleCache(str(cache)).records == 0
        damaged[offset] ^= 0x40
        cache.write_bytes(damaged)
    assert ModuleCache(str(cache)).records > 100
    cache.chmod(0o622)
    assert ModuleCache(str(cache)).records == 0
    cache.unlink()
    cache.symlink_to("/dev/zero")
    assert ModuleCache(str(cache)).records == 0


def test_elf_names() -> None:
    elf = read_elf(Path(find_library("libtpms.so.0")).read_bytes())
    assert elf.soname == "libtpms.so.0"
    assert {"libcrypto.so.3", "libc.so.6"} <= set(elf.needed)
    with pytest.raises(BackendError) as caught:
        find_library("libnothing.so.9")
    assert caught.value.code == "payload-library-missing"
    assert caught.value.hint is not None


def test_damaged_elf_is_an_error_or_a_value() -> None:
    data = Path(find_library("libtpms.so.0")).read_bytes()
    generator = random.Random(2)
    whole = elf_names(data)
    assert [elf_names(data[:cut]) for cut in (0, 5, 40, 64, 100)] == ["payload-elf"] * 5
    assert elf_names(data[: len(data) // 2]) != whole
    changed = 0
    for _ in range(300):
        head = bytearray(data[:600])
        head[generator.randrange(600)] = generator.randrange(256)
        changed += elf_names(bytes(head) + data[600:]) != whole
    assert changed > 20


def elf_names(data: bytes) -> tuple[str, ...] | str:
    """What the object needs, or the code of the error; nothing else may come out."""
    try:
        return read_elf(data).needed
    except SvsmError as error:
        return error.code


def test_the_trusted_code_grows_only_announced() -> None:
    text, table = (ROOT / "docs" / "TCB.md").read_text(encoding="utf-8"), tcb_table()
    if sys.version_info[:2] != (3, 11) or "_bisect" in sys.builtin_module_names:
        # Another release, or Debian's build with most modules built in, lists other parts of the standard library.
        text, table = (whole.partition("## Foreign code")[0] for whole in (text, table))
    assert table == text, f"the measured code changed: look at it, then run: {COMMAND}"


def test_the_list_of_trusted_code_shows_a_single_changed_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tcb_table().splitlines()
    whole = Modules.source

    def changed(self: Modules, module: Module) -> bytes:
        data = whole(self, module)
        return data.replace(b"SPDX", b"SPDY", 1) if module.name == "svsm.kernel.boot" else data

    monkeypatch.setattr(Modules, "source", changed)
    after = tcb_table().splitlines()
    (line,) = (new for old, new in zip(before, after, strict=True) if old != new)
    assert line.startswith("| `svsm.kernel.boot` |")


def test_a_releases_entry_has_the_digest_of_every_owners_image(
    built: Payload, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tcb", "--release"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    entry = json.loads(line)
    for key in (b"one owner's key", b"another's"):
        image = build_image(loader=built.loader, archive=built.archive, settings=Settings(key).pack())
        assert entry["payload_digest"] == payload_digest(IgvmFile.parse(image)).hex()
    assert entry["environment"]["python"] == built.manifest.python
    other = dataclasses.replace(built.manifest, libraries={**built.manifest.libraries, "libc.so.6": "0" * 64})
    changed = Release.of(dataclasses.replace(built, manifest=other), entry["payload_digest"])
    assert changed.environment != entry["environment"]["digest"]
    assert changed.code == entry["code"]


def test_versions_are_known_for_what_the_manifest_names_by_hash(built: Payload) -> None:
    found = versions(built.manifest)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["libc"].startswith("glibc 2.")
    assert {"cffi", "cryptography", "libcrypto.so.3", "libtpms.so.0"} <= found.keys()
    assert "unknown" not in found.values()


def test_the_loader_is_one_file_that_needs_nothing_of_svsm_to_start() -> None:
    text = payload_module.LOADER.read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in head if "svsm" in line]
