# SPDX-License-Identifier: MIT OR Apache-2.0
"""Figures of the vCPU: exits and calls per second, with the chip's side in the same machine but another process.

    python -m tests.bench guest
    python -m tests.bench.guest_exits

The second prints one JSON object. `exits_per_s` is RUN → VMGEXIT → EXIT over the socket; `calls_per_s` is the
stub and the kernel's request loop answering QUERY_PROTOCOL (two exits each: the call, and HLT).
"""

from __future__ import annotations

import json
import sys
import time

from tests.bench.report import Result, Row
from tests.e2e.small_machine import Machine
from tests.unit.hardware.vcpu_rig import CODE, GUEST, GUEST_BYTES, VcpuRig, registers

__all__ = ["bench", "measure"]


def measure(count: int) -> dict[str, float]:
    """Run `count` of each; rates per second."""
    figures: dict[str, float] = {}
    with VcpuRig(process=True) as rig:
        rig.map(GUEST, GUEST_BYTES)
        rig.poke(CODE, b"\xf3\x0f\x01\xd9")
        state = registers()
        rig.run(state)
        started = time.perf_counter()
        for _ in range(count):
            rig.run(state)
        figures["exits_per_s"] = round(count / (time.perf_counter() - started))
    with Machine() as machine:
        machine.call(6, 1)
        started = time.perf_counter()
        for _ in range(count):
            machine.call(6, 1)
        figures["calls_per_s"] = round(count / (time.perf_counter() - started))
    with VcpuRig(process=True) as rig:
        rig.map(GUEST, GUEST_BYTES)
        rig.poke(CODE, b"\x48\xff\xc0\xeb\xfb")
        message = rig.run(registers(), time_limit_us=250_000)
        figures["blocks_per_s"] = message.registers.rax * 4
    return figures


def bench(count: int = 5000) -> Result:
    """For `python -m tests.bench`."""
    found = measure(count)
    rows = [
        Row("exits", found["exits_per_s"], "1/s", more_is_better=True),
        Row("calls (QUERY_PROTOCOL)", found["calls_per_s"], "1/s", more_is_better=True),
        Row("basic blocks", found["blocks_per_s"], "1/s", more_is_better=True),
    ]
    return Result(rows, details={"count": count})


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 5000), indent=2) + "\n")
