# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every error code that the source raises has a page, every page belongs to a code, and docs/errors.md is current."""

from __future__ import annotations

import ast
from pathlib import Path

from svsm.cli.explain import catalogue, markdown

_ROOT = Path(__file__).resolve().parents[3]


def _raised_codes() -> dict[str, str]:
    codes: dict[str, str] = {}
    for path in sorted((_ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                    codes[code] = f"{path.relative_to(_ROOT)}:{node.value.lineno}"
    return codes


def _strings_in_source() -> set[str]:
    return {
        node.value
        for path in (_ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_raised_code_has_a_page() -> None:
    pages = catalogue()
    missing = {code: where for code, where in _raised_codes().items() if code not in pages}
    assert not missing


def test_every_page_belongs_to_a_code_of_the_source() -> None:
    assert not sorted(set(catalogue()) - _strings_in_source())


def test_pages_say_something() -> None:
    for page in catalogue().values():
        assert len(page.title) > 10, page.code
        assert len(page.cause) > 20, page.code
        assert len(page.cure) > 10, page.code


def test_the_published_page_is_current() -> None:
    published = (_ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert published == markdown(), "run: ./run svsm explain --markdown > docs/errors.md"
