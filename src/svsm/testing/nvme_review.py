# SPDX-License-Identifier: MIT OR Apache-2.0
"""The review of the NVMe driver as data: every field that a controller controls, and the line that judges it.

Each row names the field, what a controller could do with it, the exact source text of the check, the same text
without it, and attacks of `svsm.testing.nvme_attacks`. The function that the text is in is found in the source, so the
table cannot name a place that has moved. `notices` rebuilds the driver without the check and says whether an attack
goes another way then: a check whose removal nobody notices is not tested. `markdown` writes `docs/review/nvme.md`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

import svsm.storage.drivers.nvme as driver_package
from svsm.testing.nvme_review_rows import ROWS, Row

__all__ = ["ROWS", "Row", "markdown", "notices", "place", "source_of"]

_PACKAGE: Final = driver_package.__name__
_FOLDER: Final = Path(driver_package.__path__[0])
_REBUILT: Final = (_PACKAGE, "svsm.testing.nvme_model", "svsm.testing.nvme_attacks")
_HEAD: Final = """# Review: what an NVMe controller controls

Made from `svsm.testing.nvme_review_rows` by `python -m svsm.testing.nvme_review`; a test fails when it differs.

Everything below is written by the controller or its host. "Checked in" is the function that judges it; "noticed by"
names attacks of `svsm.testing.nvme_attacks`, of which at least one no longer gets what it should when the check is
taken out of the source: the tests do that, row by row. A row without such attacks says why none is needed.
What a controller controls and the driver never looks at (submission queue entries and PRP lists after they were
written, the version register, serial number and names, NCAP, NUSE, reserved fields) has no row: there is nothing to
check. What no check can find (old contents replayed, sectors swapped, data corrupted, a flush that did nothing) is for
the file system above: it authenticates.
"""


def source_of(module: str) -> str:
    """The source of a module of the driver."""
    return (_FOLDER / f"{module}.py").read_text(encoding="utf-8")


def place(row: Row) -> str:
    """``module.Class.function`` that holds the check.

    Raises:
        LookupError: The text is not there exactly once, or not in a function.
    """
    source = source_of(row.module)
    if source.count(row.check) != 1:
        raise LookupError(f"{row.module}: {row.check!r} is there {source.count(row.check)} times")
    line = source[: source.index(row.check)].count("\n") + 1
    names: list[str] = []
    scope: Sequence[ast.stmt] = ast.parse(source).body
    while True:
        for node in scope:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.lineno <= line <= (node.end_lineno or 0):
                names.append(node.name)
                scope = node.body
                break
        else:
            break
    if not names:
        raise LookupError(f"{row.module}: {row.check!r} is in no function")
    return ".".join([row.module, *names])


class _Mutator(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the driver from changed source."""

    def __init__(self, module: str, source: str) -> None:
        self._name = f"{_PACKAGE}.{module}"
        self._source = source
        self._path = str(_FOLDER / f"{module}.py")

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """For that module only."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        """The changed source."""
        exec(compile(self._source, self._path, "exec"), module.__dict__)  # noqa: S102


def _rebuilt(name: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in _REBUILT)


def notices(row: Row) -> str:
    """The first attack of a row that goes another way without the check, as "name: what came of it"; or ""."""
    kept = {name: module for name, module in sys.modules.items() if _rebuilt(name)}
    parents = {
        (name.rpartition(".")[0], name.rpartition(".")[2]): module
        for name, module in kept.items()
        if name.rpartition(".")[0] in sys.modules and not _rebuilt(name.rpartition(".")[0])
    }
    for name in kept:
        del sys.modules[name]
    finder = _Mutator(row.module, source_of(row.module).replace(row.check, row.without))
    sys.meta_path.insert(0, finder)
    try:
        for attack in importlib.import_module("svsm.testing.nvme_attacks").ATTACKS:
            if attack.name in row.attacks:
                try:
                    outcome = attack.run()
                except Exception as error:
                    return f"{attack.name}: {type(error).__name__}"
                if outcome != attack.expected:
                    return f"{attack.name}: {outcome}"
        return ""
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _rebuilt(name)]:
            del sys.modules[name]
        sys.modules.update(kept)
        for (parent, child), module in parents.items():
            setattr(sys.modules[parent], child, module)


def markdown() -> str:
    """The table as a page."""
    lines = [_HEAD]
    for part in dict.fromkeys(row.part for row in ROWS):
        lines += [f"\n## {part}\n", "| field | what a controller could do | checked in | noticed by |"]
        lines.append("|---|---|---|---|")
        for row in ROWS:
            if row.part == part:
                noticed = "; ".join(row.attacks) if row.attacks else f"*{row.reason}*"
                lines.append(f"| {row.field} | {row.threat} | `{place(row)}` | {noticed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
