# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs the benchmarks, prints a table with ratios to the peers that are installed, keeps the figures.

    ./run bench [NAME ...] [--no-write] [--realtime]

Figures go to docs/figures/NAME.json, with commit, machine and peer versions. `--realtime` (root) gives the benchmarks
the processors ahead of everything else (SCHED_FIFO), for a machine that has other work to do; the file says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from tests.bench import (
    bench_boot,
    bench_cocoonfs,
    bench_digest,
    bench_memory,
    bench_qtest,
    bench_vhost_user,
    bench_virtio_driver,
    bench_volume_command,
    bench_vtpm,
    guest_exits,
)
from tests.bench.report import Result, circumstances, table, write

__all__ = ["BENCHES", "main"]

BENCHES: dict[str, Callable[[], Result]] = {
    "snp-digest": bench_digest.bench,
    "cocoonfs": bench_cocoonfs.bench,
    "volume-command": bench_volume_command.bench,
    "vtpm-getrandom": bench_vtpm.bench,
    "guest": guest_exits.bench,
    "boot": bench_boot.bench,
    "memory": bench_memory.bench,
    "vhost-user": bench_vhost_user.bench,
    "virtio-driver": bench_virtio_driver.bench,
    "qtest": bench_qtest.bench,
}


def main(words: list[str]) -> int:
    """The command line; 1 when a benchmark could not run."""
    parser = argparse.ArgumentParser(prog="./run bench", description="benchmarks, beside their peers")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--no-write", action="store_true", help="leave docs/figures alone")
    parser.add_argument("--realtime", action="store_true", help="run ahead of everything else (root)")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.names) - set(BENCHES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}")
    if arguments.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    status = 0
    for name in arguments.names or BENCHES:
        before, begun, processors = circumstances(), time.monotonic(), os.sched_getaffinity(0)
        try:
            result = BENCHES[name]()
        except RuntimeError as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
            status = 1
            continue
        finally:
            os.sched_setaffinity(0, processors)
        print(table(name, result))
        print(f"  ({time.monotonic() - begun:.0f} s)\n", flush=True)
        if not arguments.no_write:
            write(name, result, before)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
