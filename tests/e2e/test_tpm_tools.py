# SPDX-License-Identifier: MIT OR Apache-2.0
"""tpm2-tools against the socket of a running system, Unix and TCP; and what that system costs when nobody asks."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats import tpm
from svsm.kernel.tpm import MAX_TPM_CLIENTS
from tests.e2e.boot_support import short_folder
from tests.e2e.tpm_support import System, TpmClient
from tests.interop.test_vtpm_tools import NV_ATTRIBUTES, Tools
from tests.support import peer

pytestmark = [pytest.mark.e2e, pytest.mark.interop]

_IDLE_SECONDS = 3.0
_IDLE_MS = 50.0


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    peer("tpm2_getrandom")
    where = short_folder()
    made = System(where, "--tpm-tcp", "0")
    try:
        made.start()
        yield made
        assert made.stop() == 0
    finally:
        made.close()
        shutil.rmtree(where)


@pytest.fixture(params=["tcti", "tcti_tcp"])
def tools(system: System, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tools]:
    """The tools over one of the transports, and no object of theirs left in the TPM afterwards."""
    made = Tools(tmp_path, str(system.ready[request.param]))
    yield made
    made.run("flushcontext", "-t")
    for index in made.run("getcap", "handles-nv-index").stdout.decode().replace("-", " ").split():
        made.run("nvundefine", "-C", "o", index)


def test_random_numbers(tools: Tools) -> None:
    first, second = (tools.run("getrandom", "--hex", "16").stdout for _ in range(2))
    assert len(first) == len(second) == 32
    assert first != second


def test_keys_sign_and_nv_keeps(tools: Tools, tmp_path: Path) -> None:
    tools.run("createprimary", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    tools.run("create", "-C", "primary.ctx", "-G", "ecc", "-u", "key.pub", "-r", "key.priv", "-c", "key.ctx")
    tools.run("flushcontext", "-t")  # the TPM has room for three
    (tmp_path / "message").write_bytes(b"signed by the TPM")
    tools.run("sign", "-c", "key.ctx", "-g", "sha256", "-o", "signature", "message")
    tools.run("flushcontext", "-t")
    tools.run("verifysignature", "-c", "key.ctx", "-g", "sha256", "-s", "signature", "-m", "message")
    tools.run("nvdefine", "-C", "o", "-s", "32", "-a", NV_ATTRIBUTES, "0x1500001")
    (tmp_path / "value").write_bytes(bytes(range(32)))
    tools.run("nvwrite", "-C", "o", "-i", "value", "0x1500001")
    assert tools.run("nvread", "-C", "o", "-s", "32", "0x1500001").stdout == bytes(range(32))


def test_the_ek_is_the_announced_one_and_quotes_check(system: System, tools: Tools, tmp_path: Path) -> None:
    tools.run("createek", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
    assert tpm.ek_name((tmp_path / "ek.pub").read_bytes()[2:]).hex() == system.ready["ek_name"]
    tools.run("flushcontext", "-t")
    attestation = ["-G", "ecc", "-g", "sha256", "-s", "ecdsa"]
    tools.run("createak", "-C", "ek.ctx", "-c", "ak.ctx", *attestation, "-u", "ak.pem", "-f", "pem")
    tools.run("flushcontext", "-t")
    tools.run("pcrextend", "16:sha256=" + "11" * 32)
    files = ["-m", "quote", "-s", "signature"]
    tools.run("quote", "-c", "ak.ctx", "-l", "sha256:0,16", "-q", "aabb", *files, "-o", "pcrs")
    check = ["-u", "ak.pem", *files, "-f", "pcrs", "-g", "sha256", "-q"]
    tools.run("checkquote", *check, "aabb")
    assert tools.run("checkquote", *check, "aabc", allow=True).returncode != 0
    tools.run("pcrreset", "16")


def test_a_crowd_of_clients_is_capped_and_the_others_are_served(system: System) -> None:
    with TpmClient(system.where) as first, contextlib.ExitStack() as crowd:
        first.run(tpm.get_random(8))
        for _ in range(2 * MAX_TPM_CLIENTS):
            one = crowd.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            one.connect(str(system.where))
        system.instance.wait_for("client-refused", code="client-limit", seconds=10)
        for _ in range(20):
            assert len(first.run(tpm.get_random(8))) == 20
    deadline = time.monotonic() + 10
    while True:  # the places of the crowd come free
        try:
            with TpmClient(system.where) as again:
                assert len(again.ask(tpm.get_random(8))) == 20
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _cpu_ms(pid: int) -> float:
    """CPU time of a process's threads, from the scheduler's own counters (nanoseconds)."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def _settled(system: System) -> dict[int, float]:
    """The times of the processes once none of them has run for half a second: what was asked before is done."""
    pids = system.processes()
    since, total = time.monotonic(), 0.0
    deadline = since + 60
    while True:
        now = {pid: _cpu_ms(pid) for pid in pids}
        if sum(now.values()) - total >= _IDLE_MS / 10:
            since, total = time.monotonic(), sum(now.values())
        elif time.monotonic() - since >= 0.5:
            return now
        assert time.monotonic() < deadline, "they never rest"
        time.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="counting the time of other uids' processes needs root")
def test_nothing_runs_while_nobody_asks(system: System) -> None:
    with TpmClient(system.where) as client, contextlib.ExitStack() as others:
        client.run(tpm.get_random(8))
        half, deaf, mute, gone = (
            others.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for _ in range(4)
        )
        for connection in (half, deaf, gone):
            connection.connect(str(system.where))
        mute.connect(f"{system.where}.ctrl")
        half.sendall(tpm.get_random(8)[:7])
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # until neither answers nor questions fit anywhere
                deaf.send(tpm.get_random(48) * 50)
        gone.shutdown(socket.SHUT_WR)
        before = _settled(system)
        assert len(before) >= 8
        time.sleep(_IDLE_SECONDS)  # not for anything to happen: this time is what is measured
        used = {pid: _cpu_ms(pid) - before[pid] for pid in before}
        assert sum(used.values()) < _IDLE_MS, used
        others.close()
        for _ in range(500):
            client.run(tpm.get_random(32))
    assert sum(_cpu_ms(pid) - before[pid] for pid in before) > sum(used.values()) + 1  # these clocks do go
