# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm explain CODE`: what an error code means, what causes it, what cures it.

The texts live in `errors/*.toml` beside this module, one file per area; docs/errors.md is made from them and a
test checks that every code raised in the source has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
from importlib import resources

from svsm.formats.errors import StateError

__all__ = ["ErrorPage", "catalogue", "configure", "markdown"]


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorPage:
    """The page of one error code."""

    code: str
    area: str
    title: str
    cause: str
    cure: str


def catalogue() -> dict[str, ErrorPage]:
    """Every page by its code.

    Raises:
        StateError: ``explain-duplicate`` when two areas claim one code.
    """
    pages: dict[str, ErrorPage] = {}
    for entry in sorted(resources.files("svsm.cli").joinpath("errors").iterdir(), key=lambda item: item.name):
        if not entry.name.endswith(".toml"):
            continue
        area = entry.name.removesuffix(".toml")
        for code, text in tomllib.loads(entry.read_text(encoding="utf-8")).items():
            if code in pages:
                raise StateError(f"error code {code} is described twice", code="explain-duplicate", area=area)
            pages[code] = ErrorPage(code, area, text["title"], text["cause"], text["cure"])
    return pages


def markdown() -> str:
    """docs/errors.md: every page, by area."""
    lines = [
        "# Error codes",
        "",
        "Made by `svsm explain --markdown`. Each code is stable: scripts may match on it.",
        "",
    ]
    area = ""
    for page in catalogue().values():
        if page.area != area:
            area = page.area
            lines += [f"## {area}", ""]
        lines += [
            f"### {page.code}",
            "",
            f"{page.title}.",
            "",
            f"*Cause.* {page.cause}",
            "",
            f"*Cure.* {page.cure}",
            "",
        ]
    return "\n".join(lines)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm explain`."""
    parser.add_argument("code", nargs="?", metavar="CODE", help="an error code, as printed in brackets")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--markdown", action="store_true", help="every page, as docs/errors.md")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print(markdown(), end="")
        return 0
    pages = catalogue()
    if arguments.code is None:
        for page in pages.values():
            print(f"{page.code:40} {page.title}")
        return 0
    found = pages.get(arguments.code)
    if found is None:
        close = difflib.get_close_matches(arguments.code, pages, n=3)
        raise StateError(
            f"there is no error code {arguments.code}",
            code="explain-unknown",
            hint=f"did you mean {', '.join(close)}?" if close else "`svsm explain` without a code lists all of them",
        )
    if arguments.json:
        print(json.dumps({"schema": 1, **dataclasses.asdict(found)}))
    else:
        print(f"{found.code}: {found.title}\n\ncause: {found.cause}\n\ncure:  {found.cure}")
    return 0
