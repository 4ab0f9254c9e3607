# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm fuzz`: look for inputs that our parsers and state machines cannot take.

One target or `all`, for a set time each, continuing from the corpus folder. A finding is written as a minimised
reproducer; docs/fuzzing.md says how it becomes a regression test. `review` takes the checks of the drivers' reviews
out, one by one, and demands that the fuzzer finds each removal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svsm.fuzz.runner import Summary

__all__ = ["configure"]

_WORK = Path("build/fuzz")
_MAX_SECONDS = 7 * 24 * 3600.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm fuzz`."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="what to fuzz, or `all`; see --list. `review`: take the drivers' checks out one by one, and find that",
    )
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--time", type=_seconds, default=60.0, metavar="SECONDS", help="for each target (default: 60)")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="continue from here, add to it (default: build/fuzz/corpus/TARGET)"
    )
    parser.add_argument(
        "--findings", type=Path, metavar="DIR", help="where reproducers go (default: build/fuzz/findings/TARGET)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the random choices (default: 1)")
    parser.add_argument(
        "--engine",
        choices=("auto", "atheris", "builtin"),
        default="auto",
        help="atheris where it is installed, else a simple engine of our own (default: auto)",
    )
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run one input and show what happens")
    parser.add_argument(
        "--distil", type=Path, metavar="DIR", help="write the few inputs of the corpus that the repository should keep"
    )
    parser.add_argument("--row", default="", metavar="TEXT", help="review: only rows whose name has this text")
    parser.add_argument("--record", type=Path, metavar="FILE", help="review: keep what was found here")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and target")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is no time: more than 0, at most {_MAX_SECONDS:.0f} seconds")
    return value


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from svsm.fuzz.targets import TARGETS, find

    if arguments.list:
        for target in TARGETS:
            print(f"{target.name:24} {target.summary}")
        return 0
    if arguments.target is None:
        listed = textwrap.fill(", ".join(target.name for target in TARGETS), break_on_hyphens=False)
        parser.error(f"which target? `all`, `review`, or one of (see --list):\n{listed}")
    if arguments.reproduce is not None:
        return _reproduce(arguments)
    if arguments.distil is not None:
        return _distil(arguments)
    if arguments.target == "review":
        return _review(arguments)
    names = [target.name for target in TARGETS] if arguments.target == "all" else [find(arguments.target).name]
    found = 0
    for name in names:
        summary = _fuzz(name, arguments)
        found += len(summary.findings)
        _show(summary, as_json=arguments.json)
    return 1 if found else 0


def _fuzz(name: str, arguments: argparse.Namespace) -> Summary:
    from svsm.fuzz.runner import choose_engine, run_target

    several = arguments.target == "all"
    corpus = (arguments.corpus / name if several else arguments.corpus) if arguments.corpus else _WORK / "corpus" / name
    findings = arguments.findings or _WORK / "findings"
    engine = choose_engine(arguments.engine)
    if sys.stderr.isatty():
        print(f"{name}: {engine}, {arguments.time:.0f} s …", file=sys.stderr)
    return run_target(
        name,
        engine=engine,
        corpus=corpus,
        extra=[Path("fuzz/corpus") / name],
        findings=findings / name if several or not arguments.findings else findings,
        seconds=arguments.time,
        seed=arguments.seed,
    )


def _show(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"schema": 1, **dataclasses.asdict(summary)}), flush=True)
        return
    coverage = "" if summary.coverage is None else f", coverage {summary.coverage} edges"
    print(
        f"{summary.target}: {summary.executions} executions in {summary.seconds:.0f} s ({summary.engine}){coverage}, "
        f"{summary.new_inputs} new inputs ({summary.corpus_inputs} in the corpus), {len(summary.findings)} findings",
        flush=True,
    )
    for finding in summary.findings:
        print(f"  {finding.signature}\n  reproducer: {finding.file}", flush=True)


def _review(arguments: argparse.Namespace) -> int:
    from svsm.formats.errors import StateError
    from svsm.fuzz.review import find_removal
    from svsm.testing.reviews import REVIEWS, read_found, write_found

    record = read_found(arguments.record) if arguments.record else {}
    tried = missed = 0
    for review in REVIEWS:
        for row in review.rows:
            name = f"{review.name}: {row.name}"
            if arguments.row not in name or not review.target_of(row):
                continue
            found = find_removal(review, row, seconds=arguments.time, seed=arguments.seed)
            tried += 1
            missed += found is None
            if found is not None:
                record.setdefault(review.name, {})[row.name] = found
            if arguments.json:
                entry = None if found is None else dataclasses.asdict(found)
                print(json.dumps({"schema": 1, "review": review.name, "row": row.name, "found": entry}), flush=True)
            elif found is None:
                print(f"{name}: NOT FOUND in {arguments.time:.0f} s", flush=True)
            else:
                print(f"{name}: {found.target}, {found.seconds:.1f} s, {found.executions} inputs", flush=True)
    if not tried:
        raise StateError(
            "no row of a review has this text in its name, and a check to take out",
            code="fuzz-row",
            hint="docs/review names the rows; the text may have the section before it, as in `Completions: SQID`",
            got=arguments.row,
        )
    if arguments.record:
        write_found(arguments.record, record)
    return 1 if missed else 0


@contextlib.contextmanager
def _readable(path: Path, hint: str) -> Iterator[None]:
    """Around reading what the command line names.

    Raises:
        BackendError: ``fuzz-input``.
    """
    from svsm.formats.errors import BackendError

    try:
        yield
    except OSError as error:
        raise BackendError(
            f"cannot read the input {path}: {error.strerror}", code="fuzz-input", hint=hint, path=str(path)
        ) from error


def _distil(arguments: argparse.Namespace) -> int:
    from svsm.fuzz.distil import distilled
    from svsm.fuzz.targets import find
    from svsm.fuzz.worker import save_input

    target = find(arguments.target)
    corpus = arguments.corpus or _WORK / "corpus" / target.name
    with _readable(corpus, "--corpus names a folder of inputs; a run of the target makes the default one"):
        inputs = [path.read_bytes() for path in sorted(corpus.iterdir()) if path.is_file()]
    kept = distilled(target, inputs)
    arguments.distil.mkdir(parents=True, exist_ok=True)
    for data in kept:
        save_input(arguments.distil, data)
    print(f"{target.name}: {len(kept)} inputs, {sum(map(len, kept))} bytes")
    return 0


def _reproduce(arguments: argparse.Namespace) -> int:
    from svsm.fuzz.target import Finding, execute
    from svsm.fuzz.targets import find

    target = find(arguments.target)
    with _readable(arguments.reproduce, "--reproduce names one input, such as a file in build/fuzz/findings/TARGET"):
        data = arguments.reproduce.read_bytes()
    try:
        outcome = execute(target, data)
    except Finding as finding:
        print(f"finding: {finding.signature}\n\n{finding.text}", end="")
        return 1
    print(f"no finding: {outcome.verdict.value}{f' ({outcome.reason})' if outcome.reason else ''}")
    return 0
