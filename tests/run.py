# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs the test suites, each within a budget, and refuses a suite that ran fewer cases than it promises.

`tests/promises.toml` says for each suite how many cases must pass and how many seconds it may take, for the quick
run and for `--long`. A suite that lost cases (a folder renamed, a marker mistyped, a peer that vanished) is a
failure here, not a green run with a smaller number. In CI so is a skip whose reason `promises.toml` does not allow;
what only root can look at may skip where the run is an ordinary user's, and is counted as kept then.

What tests count themselves (power cuts, images) they record with pytest's `record_property`; the sums, by name, stand
under the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent
_ROOT = _TESTS.parent


@dataclasses.dataclass(frozen=True, slots=True)
class _Suite:
    name: str
    path: str
    cases: int
    budget_s: int
    workers: int


@dataclasses.dataclass(slots=True)
class _Outcome:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    complaint: str = ""
    reasons: list[str] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)


def _promises() -> dict[str, Any]:
    return tomllib.loads((_TESTS / "promises.toml").read_text(encoding="utf-8"))


def _suites(profile: str) -> list[_Suite]:
    return [
        _Suite(
            name,
            entry.get("path", f"tests/{name}"),
            entry[profile]["cases"],
            entry[profile]["budget_s"],
            entry.get("workers", 1),
        )
        for name, entry in _promises()["suite"].items()
        if profile in entry
    ]


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def _run(suite: _Suite, profile: str, extra: list[str]) -> _Outcome:
    report = _ROOT / "build" / "tests" / f"{suite.name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", suite.path, f"--junitxml={report}", "--no-header"]
    command += ["-m", "not long"] if profile == "quick" else []
    command += ["-n", str(suite.workers), "--dist", "loadfile"] if suite.workers > 1 else []
    command += ["--durations=5", "--durations-min=3", "-rs"]
    started = time.monotonic()
    try:
        # A suite that hangs is ended well after its budget; its processes are ours and end with it.
        code = subprocess.run([*command, *extra], cwd=_ROOT, timeout=suite.budget_s * 3 + 120).returncode
    except subprocess.TimeoutExpired:
        return _Outcome(failed=1, seconds=time.monotonic() - started, complaint="did not end")
    outcome = _Outcome(seconds=time.monotonic() - started)
    if report.exists():
        for element in ElementTree.parse(report).getroot().iter("testsuite"):
            total, bad = int(element.get("tests", 0)), int(element.get("failures", 0)) + int(element.get("errors", 0))
            outcome.failed += bad
            outcome.skipped += int(element.get("skipped", 0))
            outcome.passed += total - bad - int(element.get("skipped", 0))
            outcome.reasons += [skipped.get("message", "") for skipped in element.iter("skipped")]
            outcome.counts.update(_counts(element))
    if code != 0 and not (code == 1 and outcome.failed):
        outcome.complaint = f"pytest ended with {code}, see above"
    elif outcome.passed < suite.cases:
        outcome.complaint = f"promised {suite.cases} cases"
    elif outcome.seconds > suite.budget_s:
        outcome.complaint = "over its budget"
    return outcome


def _counts(suite: ElementTree.Element) -> Counter[str]:
    """The sums, by name, of the numbers that a suite's tests recorded."""
    counts: Counter[str] = Counter()
    for recorded in suite.iterfind("testcase/properties/property"):
        counts[recorded.get("name", "")] += int(recorded.get("value", ""))
    return counts


def main() -> int:
    """Run the suites named (all by default); 0 when each kept its promise."""
    parser = argparse.ArgumentParser(prog="./run test", description="Run the tests.")
    parser.add_argument("--long", action="store_true", help="every case, with the long budgets")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="unit, property, vectors, interop, e2e, installed")
    parser.add_argument("--pytest", action="append", default=[], metavar="WORD", help="a word for pytest itself")
    arguments = parser.parse_args()
    profile = "long" if arguments.long else "quick"
    # A suite with a path of its own is a part of another one: it runs when it is named.
    suites = [
        suite
        for suite in _suites(profile)
        if suite.name in arguments.suites or (not arguments.suites and suite.path == f"tests/{suite.name}")
    ]
    unknown = sorted(set(arguments.suites) - {suite.name for suite in suites})
    if unknown:
        parser.error(f"there is no suite {', '.join(unknown)}")
    skips = _promises()["skips"]
    for_root = set(skips["needs_root"]) if os.geteuid() != 0 else set[str]()
    allowed = {*skips["allowed_in_ci"], *for_root}
    outcomes = [(suite, _run(suite, profile, arguments.pytest)) for suite in suites]
    print(f"\n{'suite':10} {'passed':>7} {'failed':>7} {'skipped':>8} {'promised':>9} {'used s':>8} {'budget s':>9}")
    bad = False
    for suite, outcome in outcomes:
        # Away from CI, missing peers skip; the promise then only counts what could run. Without the foreign vectors
        # nobody knows how many cases there are.
        if "promised" in outcome.complaint and not _in_ci():
            uncounted = any("empty parameter set" in reason for reason in outcome.reasons)
            if uncounted or outcome.passed + outcome.skipped >= suite.cases:
                outcome.complaint = ""
        elif "promised" in outcome.complaint and for_root:
            kept = outcome.passed + sum(reason in for_root for reason in outcome.reasons)
            outcome.complaint = "" if kept >= suite.cases else outcome.complaint
        unwanted = sorted(set(outcome.reasons) - allowed) if _in_ci() else []
        if unwanted:
            outcome.complaint += f" skipped in CI: {'; '.join(unwanted)}"
        bad = bad or bool(outcome.failed or outcome.complaint)
        print(
            f"{suite.name:10} {outcome.passed:7} {outcome.failed:7} {outcome.skipped:8} {suite.cases:9} "
            f"{outcome.seconds:8.1f} {suite.budget_s:9}  {outcome.complaint}"
        )
    for suite, outcome in outcomes:
        if outcome.counts:
            print(f"{suite.name}: {', '.join(f'{count:,} {name}' for name, count in outcome.counts.items())}")
    passed, failed = sum(o.passed for _, o in outcomes), sum(o.failed for _, o in outcomes)
    print(f"{passed} passed, {failed} failed, {sum(o.skipped for _, o in outcomes)} skipped")
    return 1 if bad or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
