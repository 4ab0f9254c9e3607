# SPDX-License-Identifier: MIT OR Apache-2.0
"""Rules for the source that a linter has no name for: sizes, licence lines, and what a library must not do."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import absent

ROOT = Path(__file__).parents[3]
SPDX = "# SPDX-License-Identifier: MIT OR Apache-2.0"
MODULE_LINES = 600
FUNCTION_LINES = 80

GENERATED = {"src/svsm/services/vtpm/_libtpms_abi.py"}
# Programs that other programs start: they speak on stdout, and their exit code is an answer.
PROGRAMS = {
    "src/svsm/fuzz/worker.py",
    "src/svsm/testing/diskprocess.py",
    "src/svsm/testing/tpm_harness.py",
    "src/svsm/testing/vhost_user_disk.py",
}
# Forked children end here, without running their parent's exit handlers.
FORKS = {
    "src/svsm/hardware/spawn.py",
    "src/svsm/host/devices/virtio_process.py",
    "src/svsm/kernel/loader.py",
    "src/svsm/testing/diskprocess.py",
}


@functools.cache
def committed() -> tuple[str, ...]:
    """The files of the project, or none where this is no checkout."""
    if not (ROOT / ".git").exists():
        return ()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(name for name in listed.stdout.split("\0") if name and (ROOT / name).exists())


def sources(*folders: str) -> list[str]:
    return [name for name in committed() if name.endswith(".py") and name.startswith(folders)]


def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


@pytest.fixture(autouse=True)
def checkout() -> None:
    if not committed():
        raise absent("this is not a git checkout")


def test_every_source_file_names_its_licence() -> None:
    wanted = [name for name in committed() if name.endswith((".py", ".sh", ".s")) or name in ("run", ".ci/run")]
    assert len(wanted) > 200
    bare = []
    for name in wanted:
        head = (ROOT / name).read_text(encoding="utf-8").splitlines()[:2]
        if head and not any(SPDX.removeprefix("# ") in line for line in head):
            bare.append(name)
    assert not bare


def test_modules_stay_short() -> None:
    lengths = {name: len((ROOT / name).read_bytes().splitlines()) for name in sources("src/", "tests/", "tools/")}
    over = {name: count for name, count in lengths.items() if count > MODULE_LINES}
    assert not {name: count for name, count in over.items() if name not in GENERATED}


def functions(name: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_functions_stay_short() -> None:
    lengths = {where: lines for name in sources("src/", "tests/", "tools/") for where, lines in functions(name)}
    assert len(lengths) > 2000
    assert not {where: lines for where, lines in lengths.items() if lines > FUNCTION_LINES}


def test_modules_explain_themselves() -> None:
    silent, public = [], []
    for name in sources("src/"):
        module = parsed(name)
        if not module.body or name in GENERATED:
            continue
        if ast.get_docstring(module) is None:
            silent.append(name)
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in module.body)
        names = {ast.unparse(node.targets[0]) for node in module.body if isinstance(node, ast.Assign)}
        names |= {ast.unparse(node.target) for node in module.body if isinstance(node, ast.AnnAssign)}
        # Programs, and the loader, whose text is measured, are no modules that anybody imports from.
        is_program = name.endswith("/__main__.py") or name == "src/svsm/kernel/loader.py"
        if defines and "__all__" not in names and not is_program:
            public.append(name)
    assert not silent
    assert not public, "no __all__"


def test_libraries_validate_with_errors_not_with_assert() -> None:
    # `python -O` removes assert, and an AssertionError is no SvsmError.
    found = [
        f"{name}:{node.lineno}"
        for name in sources("src/")
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def calls(name: str) -> Iterator[tuple[str, int]]:
    """What a module calls, by name, outside its `if __name__ == "__main__":`."""
    for statement in parsed(name).body:
        if is_main_guard(statement):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node.lineno


def test_libraries_neither_print_nor_exit_nor_configure_logging() -> None:
    spoken = {
        "print",
        "input",
        "exit",
        "quit",
        "sys.exit",
        "sys.stdout.write",
        "sys.stderr.write",
        "logging.basicConfig",
    }
    found = []
    for name in sources("src/"):
        if name.startswith("src/svsm/cli/") or name.endswith("__main__.py"):
            continue
        for call, line in calls(name):
            if call in spoken and name not in PROGRAMS and not _generator(name):
                found.append(f"{name}:{line} {call}")
            if call == "os._exit" and name not in FORKS:
                found.append(f"{name}:{line} {call}")
    assert not found


def _generator(name: str) -> bool:
    """`svsm.testing.libtpms_abi` writes a source file: it is run by a developer."""
    return name == "src/svsm/testing/libtpms_abi.py"


def test_only_main_exits_in_the_command_line() -> None:
    found = [
        f"{name}:{line}"
        for name in sources("src/svsm/cli/")
        for call, line in calls(name)
        if call in {"sys.exit", "exit", "quit"}
    ]
    assert not found


def test_nothing_generated_is_committed() -> None:
    folders = {
        "__pycache__",
        ".venv",
        "build",
        "dist",
        ".peers",
        ".hypothesis",
        ".mypy_cache",
        ".ruff_cache",
        "node_modules",
    }
    strays = [
        name
        for name in committed()
        if folders & set(Path(name).parts) or name.endswith((".pyc", ".so", ".egg-info", ".sqlite", ".whl", ".orig"))
    ]
    assert not strays
    large = {name: size for name in committed() if (size := (ROOT / name).stat().st_size) > 400_000}
    assert not large


def test_no_committed_file_names_this_machine() -> None:
    # Where this checkout happens to be means nothing elsewhere; a generic place such as / or /tmp would prove nothing.
    places = [str(place) for place in (ROOT, ROOT.parent) if len(place.parts) > 2]
    if not places:
        pytest.skip("the checkout is at a place too short to search for")
    found = []
    for name in committed():
        text = (ROOT / name).read_bytes()
        found += [name for place in places if f"{place}/".encode() in text]
    assert not found
