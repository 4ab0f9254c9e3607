# SPDX-License-Identifier: MIT OR Apache-2.0
"""SNP launch digest against the ideal loop: two SHA-384 calls a page and nothing else.

    python -m tests.bench snp-digest
    python -m tests.bench.bench_digest [MIB] [RUNS]

The second prints one JSON object: commit and machine, milliseconds of the best run of each, and the ratio
ideal / ours (1.0 is ideal, the target is 0.9). `plan_and_digest` is what `svsm igvm measure` does with a parsed
file; `parse` comes before it. Pages are random and all different, so nothing is saved by remembering contents.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import ssl
import subprocess
import sys
import time
from collections.abc import Callable

from svsm.formats.igvm import IgvmFile, plan
from svsm.launch.build import build_image
from svsm.launch.digest import launch_digest
from tests.bench.report import Result, Row

__all__ = ["bench", "run"]

_TARGET_RATIO = 0.9


def _best_ms(action: Callable[[], object], runs: int) -> float:
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def _ideal(pages: list[memoryview]) -> None:
    sha384, page_info = hashlib.sha384, bytes(112)
    for page in pages:
        sha384(page).digest()
        sha384(page_info).digest()


def run(mib: int, runs: int) -> dict[str, float]:
    """Measure an image of `mib` MiB, taking the best of `runs`; the two loops take turns."""
    archive = random.Random(1).randbytes(mib << 20)
    image = build_image(loader=b"pass\n", archive=archive, settings=b"bench")
    file = IgvmFile.parse(image)
    pages = [step.contents for step in plan(file) if step.contents is not None]
    ideal = ours = float("inf")
    for _ in range(runs):
        ideal = min(ideal, _best_ms(lambda: _ideal(pages), 1))
        ours = min(ours, _best_ms(lambda: launch_digest(file), 1))
    return {
        "pages": len(pages),
        "ideal_ms": round(ideal, 2),
        "plan_and_digest_ms": round(ours, 2),
        "ratio_to_ideal": round(ideal / ours, 3),
        "parse_ms": round(_best_ms(lambda: IgvmFile.parse(image), runs), 2),
        "plan_ms": round(_best_ms(lambda: list(plan(file)), runs), 2),
    }


def bench(mib: int = 16, runs: int = 15) -> Result:
    """For `python -m tests.bench`."""
    found = run(mib, runs)
    rows = [
        Row(f"plan and digest of {mib} MiB", found["plan_and_digest_ms"], "ms", peer=found["ideal_ms"]),
        Row("speed, of the ideal loop's", found["ratio_to_ideal"], "×", _TARGET_RATIO, more_is_better=True),
        Row("parse", found["parse_ms"], "ms"),
        Row("plan, page by page", found["plan_ms"], "ms"),
    ]
    return Result(rows, {"ideal loop": ssl.OPENSSL_VERSION}, {"mib": mib, "runs": runs, "pages": found["pages"]})


def main() -> None:
    """Entry point."""
    words = [int(word) for word in sys.argv[1:3]]
    mib, runs = (*words, *(16, 15)[len(words) :])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {
        "schema": 1,
        "benchmark": "snp-digest",
        "commit": commit.stdout.strip(),
        "machine": {"kernel": platform.release(), "processor": platform.machine()},
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "mib": mib,
        "runs": runs,
        "target_ratio": _TARGET_RATIO,
        **run(mib, runs),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
