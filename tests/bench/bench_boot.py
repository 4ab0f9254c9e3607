# SPDX-License-Identifier: MIT OR Apache-2.0
"""How long a boot takes, as its user sees it: from the start of the command to the event.

    python -m tests.bench boot

*TPM ready* is when both TPMs of the demonstration boot would answer; *ready* is after one real operation on each. The
first boot formats the volume and manufactures the TPMs; minting the machine's keys, which happens before it once, is
measured by itself. Boots are repeated and the best counts: whatever else runs on the machine only ever adds.
CPU time is that of all processes up to *ready*; on a busy machine it says more than wall time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.bench.report import Result, Row
from tests.bench.system import System, family

__all__ = ["bench"]

_TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")
_TARGET_MS = 1500
_FIRST_TARGET_MS = 2500


def _cpu_ms(pid: int) -> float:
    """CPU time of a process, its descendants, and those of them that were waited for."""
    total = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total * _TICK_MS


def _boot(state: Path, environment: Mapping[str, str] | None = None) -> dict[str, float]:
    with System(state, environment) as system:
        cpu = _cpu_ms(system.process.pid)
        mint, tpms = system.step("mint"), system.step("tpms")
        minting = float(mint.event["took_ms"]) if mint is not None else 0.0
        found = {"ready": system.ready.ms - minting, "cpu": cpu, "mint": minting}
        found["tpm_ready"] = (tpms.ms if tpms is not None else system.ready.ms) - minting
        for arrived in system.events:
            event = arrived.event
            if event["event"] == "step" and event["state"] == "done":
                found[f"step {event['step']}"] = float(event["took_ms"])
    return found


def _best(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(run[name] for run in runs) for name in runs[0]}


def bench(times: int = 7, firsts: int = 3) -> Result:
    """Boot `times` times on one state, and `firsts` times on a new one."""
    first: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="svsm-bench") as name:
        folder = Path(name)
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        cold = _boot(folder / "cold", cache)
        first = [_boot(folder / f"first{number}", cache) for number in range(firsts)]
        later = [_boot(folder / "first0", cache) for _ in range(times)]
    best_first, best = _best(first), _best(later)
    rows = [
        Row("TPM ready", best["tpm_ready"], "ms", _TARGET_MS),
        Row("ready, with a TPM operation each", best["ready"], "ms"),
        Row("CPU time of a boot", best["cpu"], "ms"),
        Row("first boot: TPM ready, without minting", best_first["tpm_ready"], "ms", _FIRST_TARGET_MS),
        Row("the same, no compiled payload modules cached", cold["tpm_ready"], "ms", _FIRST_TARGET_MS),
        Row("minting the machine, once", best_first["mint"], "ms"),
    ]
    rows += [Row(name, value, "ms") for name, value in best.items() if name.startswith("step ")]
    details = {name: [round(run[name]) for run in later] for name in ("tpm_ready", "ready", "cpu")}
    return Result(rows, details={"runs": details, "first_runs": [round(run["tpm_ready"]) for run in first]})
