# SPDX-License-Identifier: MIT OR Apache-2.0
"""What pages name is there: files and folders of the repository, modules and what is in them, and single tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PLACEHOLDERS = {"NAME", "TARGET"}
"""What a page writes where a reader is to write a name."""

_PATH = re.compile(r"(?<![\w/.~…-])(?:tests|src|docs|fuzz|tools|requirements|\.ci)/[\w./{},*-]*[\w}*/]")
_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
_TEST_FUNCTION = re.compile(r"`(test_\w+)`")
_TEST_FILE = re.compile(r"`(test_\w+\.py)`")
_MODULE = re.compile(r"(?<![\w/.-])svsm(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?(?:\.?\{[\w,]+\})?")
_FILE_NAMES = (".igvm", ".pem", ".json", ".toml")
"""`svsm.igvm` and the like are what commands write."""


def spread(text: str) -> Iterator[str]:
    """`a{b,c}` as `ab` and `ac`."""
    start, brace, rest = text.partition("{")
    if not brace:
        yield text
        return
    middle, _, end = rest.partition("}")
    for word in middle.split(","):
        yield from spread(start + word + end)


def is_path(text: str) -> bool:
    """Whether it exists, up to its first placeholder."""
    parts: list[str] = []
    for part in text.split("/"):
        if part.partition(".")[0] in PLACEHOLDERS:
            break
        parts.append(part)
    path = "/".join(parts)
    return any(True for _ in ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def defines(module: Path, name: str) -> bool:
    """Whether a module's text has this name as one of its own."""
    text = module.read_text(encoding="utf-8")
    return re.search(rf'(?:\bclass |\bdef |"|^){name}\b', text, re.MULTILINE) is not None


def is_module(text: str) -> bool:
    """Whether it is a package, a module, or a name that occurs in one."""
    place = SOURCE
    parts = text.split(".")
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        inside, rest = place / f"{part}.py", parts[number + 1 :]
        if not inside.exists():
            inside, rest = place / "__init__.py", parts[number:]
        return not rest or (inside.exists() and defines(inside, rest[0]))
    return True


def has_test(path: Path, name: str) -> bool:
    return path.exists() and f"def {name}(" in path.read_text(encoding="utf-8")


def wrong_names(text: str) -> list[str]:
    """What a page's text names and is not there."""
    wrong = [found for found in _PATH.findall(text) if not all(map(is_path, spread(found)))]
    modules = [found for found in _MODULE.findall(text) if not found.endswith(_FILE_NAMES)]
    wrong += [found for found in modules if not all(map(is_module, spread(found)))]
    wrong += [f"{path}::{name}" for path, name in _TEST.findall(text) if not has_test(ROOT / path, name)]
    files = list((ROOT / "tests").rglob("test_*.py"))
    wrong += [name for name in _TEST_FILE.findall(text) if all(path.name != name for path in files)]
    wrong += [name for name in _TEST_FUNCTION.findall(text) if not any(has_test(path, name) for path in files)]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert not wrong_names(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "tests/unit/nothing",
        "`src/svsm/{abi,nothing}`",
        "docs/figures/nothing-*.json",
        "svsm.storage.nothing",
        "svsm.abi.block.Nothing",
        "svsm.host.devices.virtio_{ring,nothing}",
        "tests/unit/project/test_docs_names.py::test_nothing",
        "`test_nothing`",
        "`test_nothing.py`",
    ],
)
def test_what_does_not_exist_is_noticed(text: str) -> None:
    assert wrong_names(text)
