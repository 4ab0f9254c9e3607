# SPDX-License-Identifier: MIT OR Apache-2.0
"""GetRandom over a Unix socket: svsm's vTPM service and swtpm, interleaved, client and server on one processor.

    python -m tests.bench vtpm-getrandom
    python -m tests.bench.bench_vtpm [--rounds N] [--commands N] [--unconfined] [--json FILE]

One connection, one command at a time, 32 random bytes each. Per round and server the median of all commands; the
result is the best round of each, and their ratio. Ours runs as in a boot: out of the measured payload, locked down.
Both servers keep their state in a file without fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from svsm.formats import tpm
from tests.bench.report import Result, Row

__all__ = ["bench", "connect", "measure", "start_svsm", "start_swtpm"]

_TARGET_RATIO = 1.6


def _pin(processor: int) -> None:
    os.sched_setaffinity(0, {processor})


def _wait_for(path: Path) -> None:
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def start_svsm(folder: Path, *, confined: bool) -> tuple[subprocess.Popen[bytes], Path]:
    """The harness; its service inherits the processor."""
    where = folder / "svsm.sock"
    command = [sys.executable, "-m", "svsm.testing.tpm_harness", *(["--confined"] if confined else [])]
    process = subprocess.Popen(
        [*command, "--state", str(folder / "svsm.state"), "--unix", str(where)], stdout=subprocess.PIPE
    )
    if process.stdout is not None:
        process.stdout.readline()
    return process, where


def start_swtpm(folder: Path, program: str) -> tuple[subprocess.Popen[bytes], Path]:
    """swtpm with a Unix data socket."""
    where = folder / "swtpm.sock"
    (folder / "swtpm").mkdir()
    state, flags = f"dir={folder / 'swtpm'}", "not-need-init,startup-clear"
    sockets = ["--server", f"type=unixio,path={where}", "--ctrl", f"type=unixio,path={where}.ctrl"]
    process = subprocess.Popen(
        [program, "socket", "--tpm2", "--tpmstate", state, "--flags", flags, *sockets], stderr=subprocess.DEVNULL
    )
    _wait_for(where)
    return process, where


def connect(where: Path) -> socket.socket:
    """A data connection."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(where))
    return client


def measure(client: socket.socket, commands: int) -> float:
    """Median latency in microseconds."""
    command = tpm.get_random(32)
    times = []
    for _ in range(commands):
        start = time.perf_counter_ns()
        client.sendall(command)
        response = client.recv(4096)
        times.append(time.perf_counter_ns() - start)
        if tpm.response_code(response) != tpm.RC_SUCCESS or len(response) != 44:
            raise RuntimeError("GetRandom failed")
    return statistics.median(times) / 1000


def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[0]


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def run(rounds: int, commands: int, *, confined: bool) -> dict[str, object]:
    """The comparison; without swtpm only our own figure."""
    peer = shutil.which("swtpm")
    _pin(max(os.sched_getaffinity(0)))
    result: dict[str, object] = {
        "schema": 1,
        "benchmark": "vtpm-getrandom-unix",
        "commit": _commit(),
        "machine": {"processor": platform.processor() or platform.machine(), "kernel": platform.release()},
        "python": platform.python_version(),
        "commands": commands,
        "confined": confined,
        "target_ratio": _TARGET_RATIO,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = {"svsm": start_svsm(folder, confined=confined)}
        if peer:
            servers["swtpm"] = start_swtpm(folder, peer)
            result["peer"] = _version(peer)
        try:
            clients = {which: connect(where) for which, (_, where) in servers.items()}
            for client in clients.values():
                measure(client, 200)
            medians: dict[str, list[float]] = {which: [] for which in servers}
            for _ in range(rounds):
                for which, client in clients.items():
                    medians[which].append(measure(client, commands))
            for client in clients.values():
                client.close()
        finally:
            for process, _ in servers.values():
                process.send_signal(signal.SIGTERM)
                process.wait(10)
                if process.stdout is not None:
                    process.stdout.close()
    result["medians_us"] = {which: [round(value, 2) for value in values] for which, values in medians.items()}
    result["best_us"] = {which: round(min(values), 2) for which, values in medians.items()}
    if peer:
        result["ratio"] = round(min(medians["svsm"]) / min(medians["swtpm"]), 3)
    return result


def bench(rounds: int = 5, commands: int = 2000) -> Result:
    """For `python -m tests.bench`."""
    found = run(rounds, commands, confined=True)
    best, ratio, version = found["best_us"], found.get("ratio"), found.get("peer")
    if not isinstance(best, dict):
        raise RuntimeError("nothing was measured")
    rows = [Row("GetRandom(32), Unix socket", best["svsm"], "µs", peer=best.get("swtpm"))]
    if isinstance(ratio, float):
        rows.append(Row("ratio to swtpm", ratio, "×", _TARGET_RATIO))
    return Result(rows, {"swtpm": str(version)} if version else {}, {"medians_us": found["medians_us"]})


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", type=int, default=2000)
    parser.add_argument("--unconfined", action="store_true", help="the service as any process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run(options.rounds, options.commands, confined=not options.unconfined)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
