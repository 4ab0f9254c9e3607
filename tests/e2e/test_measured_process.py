# SPDX-License-Identifier: MIT OR Apache-2.0
"""Real payload processes: where their code is from, what they can still do, and when they refuse to start."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import select
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from svsm.confine.syscalls import NUMBERS
from svsm.hardware.spawn import Spawner, start_spawner
from svsm.launch.payload import Payload
from tests.e2e.payload_process import ENTRIES, ROOT, events, kernel, probe_payload, service
from tests.support import in_ci, peer

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="looking into a non-dumpable process needs root")


def edited(payload: Payload, **members: bytes) -> Payload:
    """The payload with members of its archive replaced, and nothing else changed."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.archive)) as old, zipfile.ZipFile(output, "w") as new:
        for info in old.infolist():
            new.writestr(info, members.get(info.filename, old.read(info)))
    return dataclasses.replace(payload, archive=output.getvalue())


def refusal(payload: Payload) -> dict[str, Any]:
    with kernel(payload) as probe:
        return probe.first


def test_a_kernel_starts_confined() -> None:
    with kernel() as probe:
        assert probe.first["event"] == "confined"
        assert probe.first["isolation"]["seccomp"] is True
        if in_ci():
            assert probe.first["isolation"]["reduced"] == []
        assert probe.ask("context.registers['rsi']") == 0x0780_0000
        assert probe.ask("sorted(context.descriptors)") == ["console", "control", "private"]
        assert probe.ask("hashlib.sha256(b'abc').hexdigest()") == hashlib.sha256(b"abc").hexdigest()
        assert probe.ask("hashlib.sha256.__module__") == "_hashlib"
        assert probe.ask("len(os.environ)") == 0
        with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
            probe.ask("__import__('ssl')")
        with pytest.raises(RuntimeError, match="ModuleNotFoundError"):
            probe.ask("__import__('sqlite3')")


def test_a_service_calls_c_and_c_calls_back() -> None:
    with service() as probe:
        assert probe.first["isolation"]["role"] == "service"
        assert probe.ask("version") >> 16 >= 0
        assert probe.ask("call(41)") == 42
        assert probe.ask("dict(context.parameters)") == {"name": "tpm 0"}
        assert probe.ask("'cryptography' in sys.modules") is False


@pytest.mark.parametrize("start", [kernel, service])
def test_every_module_is_payload_or_listed(start: Any) -> None:
    listed = {item.path for item in probe_payload().manifest.extensions.values()}
    sources = {item.path for item in probe_payload().manifest.sources.values()}
    standard = os.path.dirname(os.__file__)
    with start() as probe:
        for name, origin in probe.ask("origins()").items():
            if origin is None:
                assert name == "__main__" or name.startswith(("typing.", "_cffi_backend.", "cryptography.", "_openssl"))
                continue
            known = origin in ("built-in", "frozen") or origin.startswith("payload:")
            assert known or origin.removeprefix(f"{standard}/") in listed | sources, f"{name}: {origin}"


@as_root
@pytest.mark.parametrize("start", [kernel, service])
def test_every_executable_mapping_is_payload_or_listed(start: Any) -> None:
    manifest = probe_payload().manifest
    standard = os.path.dirname(os.__file__)
    hashes = {*manifest.libraries.values(), *(item.sha256 for item in manifest.extensions.values())}
    with start() as probe:
        assert (probe.ask("call(1)") if start is service else 2) == 2
        paths = probe.executable_paths()
    assert "" not in paths
    for path in paths:
        if path in ("[vdso]", "[vsyscall]") or path.startswith("/memfd:payload:native/"):
            continue
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert digest in hashes | {manifest.interpreter}, path
        assert path.startswith((standard, "/")), path


def test_callback_memory_cannot_be_executed_directly() -> None:
    """The closure itself, which libffi wrote, is data now: jumping there is a crash, through the slot a call."""
    with service() as probe:
        assert probe.ask("call(1)") == 2
        with pytest.raises((EOFError, ConnectionError)):
            probe.ask("held(1)")


SERVICE_ATTACKS = {
    "read the memory of its parent": f"libc.syscall({NUMBERS['process_vm_readv']}, os.getppid(), 0, 0, 0, 0, 0)",
    "trace its parent": f"libc.syscall({NUMBERS['ptrace']}, 16, os.getppid(), 0, 0)",
    "take a descriptor": f"libc.syscall({NUMBERS['pidfd_open']}, os.getppid(), 0)",
    "open a network connection": f"libc.syscall({NUMBERS['socket']}, 2, 1, 0)",
    "start a program": f"libc.syscall({NUMBERS['execve']}, 0, 0, 0)",
}


@pytest.mark.parametrize("attack", SERVICE_ATTACKS.values(), ids=SERVICE_ATTACKS)
def test_a_hijacked_service_dies(attack: str) -> None:
    with service() as probe, pytest.raises((EOFError, ConnectionError)):
        probe.ask(attack)


@pytest.mark.parametrize("start", [kernel, service])
def test_files_and_signals_are_out_of_reach(start: Any) -> None:
    with start() as probe:
        for path in ("/etc/passwd", f"/proc/{os.getpid()}/mem", "/proc/self/mem", "/dev/null", sys.executable):
            with pytest.raises(RuntimeError, match="PermissionError"):
                probe.ask(f"os.open({path!r}, 0)")
        with pytest.raises(RuntimeError, match="PermissionError"):
            probe.ask("os.kill(os.getppid(), 0)")


@pytest.mark.parametrize(("cap", "reduced"), [(2, []), (0, ["landlock-absent"])])
def test_an_older_kernel(cap: int, reduced: list[str]) -> None:
    with service(cap=cap) as probe:
        assert probe.first["isolation"]["landlock_abi"] == cap
        assert probe.first["isolation"]["reduced"] == reduced
        with pytest.raises(RuntimeError, match="PermissionError"):
            probe.ask("os.open('/etc/passwd', 0)")


def test_a_changed_environment_is_refused_and_named() -> None:
    payload = probe_payload()
    manifest = payload.manifest.pack()
    library = next(name for name in payload.manifest.libraries if name.startswith("libc.so"))
    compiled = min(payload.manifest.extensions)  # which ones are files depends on who built the interpreter
    for old, named in (
        (payload.manifest.libraries[library], library),
        (payload.manifest.interpreter, "interpreter"),
        (payload.manifest.sources["json.decoder"].sha256, "json/decoder.py"),
        (payload.manifest.extensions[compiled].sha256, compiled),
    ):
        other = manifest.replace(old.encode(), hashlib.sha256(old.encode()).hexdigest().encode())
        first = refusal(edited(payload, manifest=other))
        assert first["event"] == "refused"
        assert first["code"] == "payload-environment-changed"
        assert named in first["message"]


def without(payload: Payload, *names: str, manifest: bytes) -> Payload:
    """The payload without members of its archive, and with that manifest."""
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.archive)) as old, zipfile.ZipFile(output, "w") as new:
        for info in old.infolist():
            if info.filename not in names:
                new.writestr(info, manifest if info.filename == "manifest" else old.read(info))
    return dataclasses.replace(payload, archive=output.getvalue())


def test_a_module_that_the_payload_does_not_have_is_refused() -> None:
    """The interpreter has loaded it from its own folder before the loader's text ran."""
    payload = probe_payload()
    first = refusal(without(payload, "code/encodings/aliases.pyc", manifest=payload.manifest.pack()))
    assert (first["event"], first["code"]) == ("refused", "payload-mapping")
    assert "module encodings.aliases comes from " in first["message"]


def test_code_that_an_object_brings_along_is_refused() -> None:
    """A manifest without one line: the system's library would be loaded for it. Landlock denies that already; where
    there is none, the look at the mappings must find it."""
    payload = probe_payload()
    name = "native/libgcc_s.so.1"
    lines = payload.manifest.pack().splitlines(keepends=True)
    kept = b"".join(line for line in lines if name.encode() not in line.split())
    assert kept.count(b"\n") < len(lines)
    image = without(payload, name, manifest=kept)
    denied = refusal(image)
    assert denied["event"] == "failed"
    assert denied["error"] == "ImportError"
    with kernel(image, cap=0) as probe:
        found = probe.first
    assert (found["event"], found["code"]) == ("refused", "payload-mapping")
    assert "libgcc_s.so.1" in found["message"]


def test_a_damaged_archive_is_refused() -> None:
    payload = probe_payload()
    first = refusal(dataclasses.replace(payload, archive=payload.archive[:-1]))
    assert (first["event"], first["code"]) == ("refused", "payload-archive")


def test_an_unsealed_archive_is_refused() -> None:
    from svsm.hardware.spawn import spawn_service

    reader, writer = os.pipe()
    archive = os.memfd_create("archive", os.MFD_ALLOW_SEALING)
    os.write(archive, probe_payload().archive)
    process, end = spawn_service(archive, "vtpm", {}, loader_text=probe_payload().loader, console=writer)
    with end:
        assert events(reader)["code"] == "payload-archive"
    assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == 3
    process.close()
    for number in (reader, writer, archive):
        os.close(number)


def test_the_checkout_is_not_what_runs(tmp_path: Path) -> None:
    """Built from a copy, then every module of the copy is made to raise: the process does not notice."""
    for name in ("src", "tests/payload_probe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "__init__.py").write_text("")
    script = (
        "import sys, pickle; from pathlib import Path; from svsm.launch.payload import build_payload;"
        f"p = build_payload(entries={ENTRIES!r}, roots=[Path({str(tmp_path)!r})], cache=None);"
        "sys.stdout.buffer.write(len(p.loader).to_bytes(4, 'little') + p.loader + p.archive)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    built = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
    length = int.from_bytes(built[:4], "little")
    payload = dataclasses.replace(probe_payload(), loader=built[4 : 4 + length], archive=built[4 + length :])
    for source in tmp_path.rglob("*.py"):
        source.write_text("raise RuntimeError('the checkout was imported')\n")
    with kernel(payload) as probe:
        assert probe.first["event"] == "confined"
        assert probe.ask("MARKER") == "as built"


def test_the_spawner_starts_reports_and_takes_everything_with_it() -> None:
    with contextlib.closing(start_spawner()) as spawner:
        _use(spawner)


def _use(spawner: Spawner) -> None:
    with service(spawner=spawner) as probe:
        assert probe.ask("call(1)") == 2
        assert spawner.status(probe.process) is None
        spawner.kill(probe.process)
        with pytest.raises((EOFError, ConnectionError)):
            probe.ask("1")
        assert select.select([probe.process], [], [], 20)[0]
        assert probe.process.ended()
        assert spawner.status(probe.process) == -9
    with kernel(spawner=spawner) as left:
        spawner.close()
        with pytest.raises((EOFError, ConnectionError)):
            left.ask("1")


@pytest.mark.interop
@pytest.mark.parametrize("role", ["kernel", "service"])
def test_strace_sees_no_file_opened_after_the_mark(tmp_path: Path, role: str) -> None:
    log = tmp_path / "strace"
    inside = (
        f"from tests.e2e.payload_process import {role} as start\n"
        "import json\n"
        "with start() as probe:\n"
        "    assert probe.first['event'] == 'confined', probe.first\n"
        '    probe.ask(\'[__import__(name) for name in ("json", "traceback", "selectors")] and 1\')\n'
        "print(len(json.dumps(probe.first, separators=(',', ':'))) + 1)\n"
    )
    command = [str(peer("strace")), "-f", "-s", "256", "-o", str(log), sys.executable, "-c", inside]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    lines = log.read_text(errors="replace").splitlines()
    # Without root strace sees calls but not the memory of a process that allows no dumps: there the mark is the line
    # of that length, and no other call writes as much.
    text = r"\"\{\\\"event\\\":\\\"confined.*" if os.geteuid() == 0 else r"0x[0-9a-f]+"
    marks = [at for at, line in enumerate(lines) if re.search(rf"write\(\d+, {text}, {int(done.stdout)}\b", line)]
    (mark,) = marks
    process = lines[mark].split()[0]
    after = [line for line in lines[mark + 1 :] if line.startswith(process + " ")]
    assert len(after) > 20
    opened = [
        line for line in after if re.match(r"\d+ +(open|openat|openat2|execve|memfd_create|socket|connect)\(", line)
    ]
    assert opened == []
    executable = [line for line in after if re.search(r"(mmap|mprotect)\(.*PROT_EXEC", line)]
    assert executable == []


SYSTEM_PYTHON = Path("/usr/bin/python3")
ELSEWHERE = """
import hashlib, os, sys
sys.path[:0] = {path!r}
from tests.e2e.payload_process import kernel, probe_payload, service
payload = probe_payload()
with kernel() as probe:
    assert probe.first["event"] == "confined", probe.first
    assert probe.ask("os.getuid()") == probe.first["isolation"]["uid"]
with service() as probe:
    assert probe.ask("call(41)") == 42
    print(hashlib.sha256(payload.archive).hexdigest(), probe.first["isolation"]["own_uid"])
"""


@pytest.mark.interop
@pytest.mark.skipif(os.geteuid() != 0, reason="playing another user needs root")
def test_another_interpreter_and_another_user(tmp_path: Path) -> None:
    """The distribution's Python (where the tests run with it: that one again), as root and as an ordinary user: same
    archive, and it runs."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if not SYSTEM_PYTHON.resolve().name.startswith(version):
        pytest.skip("the distribution's Python is none or of another version")
    packages = next(entry for entry in sys.path if entry.endswith("site-packages"))
    script = ELSEWHERE.format(path=[str(ROOT), str(ROOT / "src"), packages])
    tmp_path.chmod(0o777)
    found = []
    for uid in (0, 54321):
        done = subprocess.run(
            [str(SYSTEM_PYTHON), "-S", "-c", script],
            env={"XDG_CACHE_HOME": str(tmp_path / str(uid))},
            user=uid,
            group=uid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0][0] == found[1][0]
    assert [own for _, own in found] == ["True", "False"]
