# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a benchmark returns, how it is printed, and how it is kept: a table, and a JSON file with its circumstances.

A figure without its machine, commit and peer versions is worth nothing a month later, so they are written by one
function for all. Figures carry targets, no verdicts: a slow machine fails no test.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FIGURES", "ROOT", "Result", "Row", "circumstances", "commit", "output", "table", "write"]

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: float
    unit: str
    target: float | None = None
    """The most that it should be; the least with `more_is_better`."""
    peer: float | None = None
    """The same by the peer, in the same unit."""
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours to the peer's: below 1 is better, unless `more_is_better`."""
        return self.value / self.peer if self.peer else None

    def as_json(self) -> dict[str, object]:
        """For the figures file."""
        members = {**dataclasses.asdict(self), "ratio": self.ratio}
        del members["more_is_better"]
        return {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in members.items()
            if value is not None
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """What one benchmark found."""

    rows: Sequence[Row]
    peers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Version by name, of what was measured beside ours."""
    details: dict[str, object] = dataclasses.field(default_factory=dict)
    """Whatever else is worth keeping."""


def output(*command: str) -> str:
    """What a command prints, stripped; "" when it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is checked out, with ``+`` when files below src differ from it; "" outside git."""
    found = output("git", "rev-parse", "--short", "HEAD")
    return found + "+" if found and output("git", "status", "--porcelain", "--", "src") else found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def circumstances() -> dict[str, object]:
    """Where and on what a benchmark runs now."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": {
            "processor": _processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "load": round(os.getloadavg()[0], 2),
            "realtime": os.sched_getscheduler(0) != os.SCHED_OTHER,
        },
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def table(title: str, result: Result) -> str:
    """The figures for a person."""
    peer = next(iter(result.peers), "peer")
    lines = [f"{title:<44}{'ours':>10}{'target':>12}{peer:>12}{'ratio':>8}"]
    for row in result.rows:
        sign = "≥ " if row.more_is_better else "≤ "
        target = "" if row.target is None else sign + _number(row.target)
        name = f"  {row.name} [{row.unit}]"
        lines.append(f"{name:<44}{_number(row.value):>10}{target:>12}{_number(row.peer):>12}{_number(row.ratio):>8}")
    return "\n".join(lines)


def write(name: str, result: Result, before: dict[str, object], folder: Path = FIGURES) -> Path:
    """Keep the figures.

    Args:
        name: Of the benchmark, and of the file.
        result: What it found.
        before: `circumstances` when it began.
        folder: Where to.
    """
    members = {
        "schema": 1,
        "benchmark": name,
        **before,
        "peers": result.peers,
        "figures": [row.as_json() for row in result.rows],
        "details": result.details,
    }
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(members, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
