# SPDX-License-Identifier: MIT OR Apache-2.0
"""A review of a driver as data: every field that a device controls, and the line that judges it.

A `Row` names the field, what a device could do with it, the exact source text of the check, the same text without
it, attacks that notice when it is gone, and the fuzz target that finds that out by itself; where no attack can see it
through the whole driver, a unit test of the part does. The function that the text is in is found in the source, so a
table cannot name a place that has moved. `without` rebuilds the driver without one check, for as long as a block
lasts; `notices` runs a row's attacks against that: a check whose removal nobody notices is not tested. `markdown`
writes the page, which a test keeps current.

The reviews are `svsm.testing.hostile.review_rows` (virtio), `svsm.testing.nvme_review_rows` and
`svsm.testing.channel_review_rows`; what the fuzzers
found, and how fast, is in ``fuzz/review.json``, written by ``svsm fuzz review``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

__all__ = ["Case", "Found", "Review", "Row", "markdown", "module_name", "notices", "place", "source_of", "without"]

_DRIVERS: Final = "svsm.storage.drivers"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One thing that a device controls.

    Attributes:
        part: Of the page.
        field: As the specification names it.
        threat: What the device could do.
        module: Of the driver's package, or with its whole name.
        check: The source text that judges it; there exactly once.
        without: The same text with the check taken out.
        attacks: Names of cases, at least one of which must notice.
        target: The fuzz target that finds the removal, where it is not the review's own for that module.
        reason: Why there is nothing to take out, or nothing that an attack could see afterwards.
        test: The unit test that fails without the check where no attack does, as pytest names it, from the root.
    """

    part: str
    field: str
    threat: str
    module: str
    check: str
    without: str = ""
    attacks: tuple[str, ...] = ()
    target: str = ""
    reason: str = ""
    test: str = ""

    @property
    def name(self) -> str:
        """Of the row, in one review."""
        return f"{self.part}: {self.field}"


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One attack under one condition."""

    label: str
    run: Callable[[], str]
    expected: str


@dataclasses.dataclass(frozen=True, slots=True)
class Review:
    """The rows of one driver, and how its attacks are run.

    Attributes:
        name: On the command line.
        package: The driver's.
        rows: The table.
        head: What the page says before its tables.
        attacker: "device" or "controller", for the heading of a column.
        rebuilt: What must be imported again with a changed driver, beside the drivers.
        targets: The fuzz target by module; "" for every other one.
        attacks: The module of the cases; "" where only fuzzers notice.
        cases: Those of that module whose names are given.
        fuzzers: The module that has those, and what it is made of that must be imported again as well.
    """

    name: str
    package: str
    rows: tuple[Row, ...]
    head: str
    attacker: str
    rebuilt: tuple[str, ...]
    targets: Mapping[str, str]
    attacks: str = ""
    cases: Callable[[ModuleType, Sequence[str]], Iterable[Case]] | None = None
    fuzzers: tuple[str, ...] = ("svsm.fuzz.disks.rows", "svsm.fuzz.disks")

    def cases_of(self, names: Sequence[str]) -> Iterable[Case]:
        """The cases of these attacks, of the module as it is imported now."""
        return () if self.cases is None else self.cases(importlib.import_module(self.attacks), names)

    def target_of(self, row: Row) -> str:
        """The fuzz target that must find the removal of this row's check; "" where there is nothing to find."""
        if row.reason:
            return ""
        return row.target or self.targets.get(row.module) or self.targets[""]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """How a fuzzer found that a check is gone."""

    target: str
    executions: int
    seconds: float


def module_name(review: Review, row: Row) -> str:
    """The whole name of the module that a row is about."""
    return row.module if row.module.startswith("svsm.") else f"{review.package}.{row.module}"


def _path(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise LookupError(f"there is no module {module}")
    return Path(found.origin)


def source_of(module: str) -> str:
    """The source of a module, by its whole name."""
    return _path(module).read_text(encoding="utf-8")


def place(review: Review, row: Row) -> str:
    """``module.Class.function`` that holds the check.

    Raises:
        LookupError: The text is not there exactly once, or not in a function.
    """
    source = source_of(module_name(review, row))
    if source.count(row.check) != 1:
        raise LookupError(f"{row.module}: {row.check!r} is there {source.count(row.check)} times")
    line = source[: source.index(row.check)].count("\n") + 1 + row.check[: len(row.check) // 2].count("\n")
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
    return ".".join([row.module.removeprefix(f"{_DRIVERS}."), *names])


class _Mutator(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source."""

    def __init__(self, module: str, source: str, path: Path) -> None:
        self._name = module
        self._source = source
        self._path = str(path)

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """For that module only."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        """The changed source."""
        exec(compile(self._source, self._path, "exec"), module.__dict__)  # noqa: S102


@contextlib.contextmanager
def without(review: Review, row: Row, *, rebuilt: tuple[str, ...] = ()) -> Iterator[None]:
    """While this lasts, importing the driver, and what is built on it, gives them without the row's check.

    Args:
        review: The row's.
        row: One of its rows.
        rebuilt: More modules, or packages, that must be imported again.

    Raises:
        LookupError: As `place`.
    """
    module = module_name(review, row)
    place(review, row)
    path = _path(module)
    changed = path.read_text(encoding="utf-8").replace(row.check, row.without)
    prefixes = (_DRIVERS, module, *review.rebuilt, *rebuilt)

    def ours(name: str) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)

    kept = {name: found for name, found in sys.modules.items() if ours(name)}
    parents = {}
    for name in kept:
        parent, _, child = name.rpartition(".")
        if parent in sys.modules and not ours(parent):
            parents[parent, child] = kept[name]
    for name in kept:
        del sys.modules[name]
    finder = _Mutator(module, changed, path)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)
        for (parent, child), found in parents.items():
            setattr(sys.modules[parent], child, found)


def notices(review: Review, row: Row) -> str:
    """The first attack of a row that goes another way without the check, as "name: what came of it"; or ""."""
    with without(review, row):
        for case in review.cases_of(row.attacks):
            try:
                outcome = case.run()
            except Exception as error:
                return f"{case.label}: {type(error).__name__}"
            if outcome != case.expected:
                return f"{case.label}: {outcome}"
    return ""


def markdown(review: Review, found: Mapping[str, Found]) -> str:
    """The review as a page.

    Args:
        review: The rows.
        found: What the fuzzers found, by the name of the row.
    """
    lines = [review.head]
    for part in dict.fromkeys(row.part for row in review.rows):
        lines.append(f"\n## {part}\n")
        lines.append(f"| field | what a {review.attacker} could do | checked in | noticed by | found by the fuzzer |")
        lines.append("|---|---|---|---|---|")
        for row in review.rows:
            if row.part == part:
                cells = (row.field, row.threat, f"`{place(review, row)}`", _noticed(row), _found(review, row, found))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _noticed(row: Row) -> str:
    reason = [f"*{row.reason}*"] if row.reason else []
    test = [f"`{row.test.rpartition('/')[2]}`"] if row.test else []
    return "; ".join([*row.attacks, *reason, *test]) or "fuzzer"


def _found(review: Review, row: Row, found: Mapping[str, Found]) -> str:
    if not review.target_of(row):
        return "-"
    entry = found.get(row.name)
    if entry is None:
        return "not run"
    return f"`{entry.target}`, {max(0.1, entry.seconds):.1f} s, {entry.executions} inputs"
