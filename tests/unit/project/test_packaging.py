# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is declared, locked, written down and audited is the same list."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import svsm

ROOT = Path(__file__).parents[3]
REQUIREMENTS = ROOT / "requirements"


def _load_audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("svsm_audit", ROOT / "tools" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["svsm_audit"] = module
    spec.loader.exec_module(module)
    return module


audit: Any = _load_audit()


def project() -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return parsed


def declared(name: str) -> list[str]:
    lines = (REQUIREMENTS / f"{name}.in").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def lock(name: str) -> str:
    return (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")


def test_the_package_declares_what_is_locked() -> None:
    assert project()["project"]["dependencies"] == declared("runtime")
    assert project()["project"]["optional-dependencies"]["guest"] == declared("guest")
    assert project()["project"]["version"] == svsm.__version__


@pytest.mark.parametrize("name", ["runtime", "guest", "dev"])
def test_every_locked_version_has_hashes_and_no_address(name: str) -> None:
    text = lock(name)
    assert "://" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(audit.locked(text))
    assert all("--hash=sha256:" in entry for entry in entries)


def test_a_larger_lock_contains_the_smaller_one() -> None:
    runtime, guest, dev = (audit.locked(lock(name)).items() for name in ("runtime", "guest", "dev"))
    assert runtime < guest < dev


def names_in_table(text: str) -> set[str]:
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {name.strip() for cell in cells for name in cell.split(",")}


def test_each_locked_package_has_a_line_in_the_documentation() -> None:
    documented = names_in_table((ROOT / "docs" / "DEPENDENCIES.md").read_text(encoding="utf-8"))
    locked = set(audit.locked(lock("dev")))
    assert not locked - documented
    assert not documented - locked - {"package"}


def test_package_data_is_declared() -> None:
    patterns = project()["tool"]["setuptools"]["package-data"]["*"]
    for path in (ROOT / "src" / "svsm").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != ".DS_Store":
            assert any(path.match(pattern) for pattern in patterns), path


def answer(*entries: dict[str, Any]) -> str:
    return json.dumps({"dependencies": list(entries), "fixes": []})


CLEAN = {"name": "h11", "version": "1", "vulns": []}
BAD = {"name": "cffi", "version": "2", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}
UNKNOWN = {"name": "unicorn", "skip_reason": "Dependency not found: unicorn (2)"}


@pytest.mark.parametrize(
    ("entries", "strict", "well", "line"),
    [
        ([CLEAN], False, True, "1 of 1 locked packages audited, 0 vulnerable"),
        ([CLEAN, BAD], False, False, "VULNERABLE cffi 2: PYSEC-1, PYSEC-2"),
        ([CLEAN, UNKNOWN], False, True, "1 could NOT be audited"),
        ([CLEAN, UNKNOWN], True, False, "not audited: unicorn 2"),
    ],
)
def test_an_audit_that_could_not_be_made_says_so(
    entries: list[dict[str, Any]], strict: bool, well: bool, line: str
) -> None:
    expected = {entry["name"]: entry.get("version", "2") for entry in entries}
    lines, verdict = audit.verdict(audit.read_answer(answer(*entries)), expected, strict=strict)
    assert verdict is well
    assert line in "\n".join(lines)


def test_an_audit_that_forgets_a_package_fails() -> None:
    lines, well = audit.verdict(audit.read_answer(answer(CLEAN)), {"h11": "1", "cffi": "2"}, strict=False)
    assert not well
    assert "MISSING from the audit's answer: cffi" in lines
