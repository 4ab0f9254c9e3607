# SPDX-License-Identifier: MIT OR Apache-2.0
"""The hostile back-end on a socket, against front-ends: this project's, QEMU with SeaBIOS, a trusting one in C.

What docs/hostile.md says of each is what the long runs here see: ours never crashes, never hangs and never calls a
wrong byte good; QEMU never crashes, and stops answering its monitor only where it is not answered.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.testing.hostile.__main__ import main
from svsm.testing.hostile.served import HONEST, Plan, Report, plans, seeded, serve
from svsm.testing.hostile.trial import RINGS
from tests.support import peer, peer_source

pytestmark = pytest.mark.interop

_OURS = (sys.executable, "-m", "svsm.testing.hostile", "front-end", "ours", "{socket}")
_QEMU = (sys.executable, "-m", "svsm.testing.hostile", "front-end", "qemu", "{socket}", "--seconds", "8")

_UNANSWERED = ("does not answer", "answers half")


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vh") as folder:
        yield Path(folder) / "sock"


def _named(words: str, ring: str = "split") -> Plan:
    return next(plan for plan in plans() if words in plan.name and ring in plan.rings)


def _ours(plan: Plan, path: Path, ring: str = "split") -> Report:
    return serve(plan, path, ring=ring, seconds=60, command=_OURS)


@pytest.mark.parametrize("ring", ["packed", *(pytest.param(ring, marks=pytest.mark.long) for ring in RINGS[::3])])
def test_an_honest_one_serves(ring: str, path: Path) -> None:
    report = _ours(HONEST, path, ring)
    assert (report.verdict, report.front_end, report.output) == ("not reached", "exit 0", "right")
    assert report.requests > 40
    assert report.lies == 0
    assert report.connection == "front-end"
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("identifier beyond the ring", "block-io virtio-used-id"),
        ("VERSION_1", "virtio-features-missing"),
        ("SET_MEM_TABLE: the back-end closes in the header", "vhost-user-gone"),
    ],
)
def test_ours_says_what_happened(words: str, output: str, path: Path) -> None:
    report = _ours(_named(words), path)
    assert (report.verdict, report.front_end, report.output) == ("error", "exit 3", output)
    assert report.lies


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ring", RINGS)
def test_ours_survives_all_of_them(ring: str, path: Path) -> None:
    there = [plan for plan in plans() if ring in plan.rings]
    for plan in there[:: 1 if ring == "split" else 5]:  # what is said does not depend on the ring
        report = _ours(plan, path, ring)
        assert report.front_end in ("exit 0", "exit 3"), report


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ours_survives_mixtures(path: Path) -> None:
    source = random.Random(9)
    for turn in range(60):
        plan = seeded(source.randbytes(64), rounds=source.randrange(60), messages=turn % 3 == 0)
        report = _ours(plan, path, RINGS[turn % len(RINGS)])
        assert report.front_end in ("exit 0", "exit 3"), report


def test_qemu_boots_from_it(path: Path) -> None:
    peer("qemu-system-x86_64")
    report = serve(HONEST, path, seconds=60, command=(*_QEMU[:-1], "50"))
    assert json.loads(report.output)["result"] == "booted"
    assert report.requests == 9


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_qemu_lives_through_all_of_them(path: Path) -> None:
    peer("qemu-system-x86_64")
    for place, plan in enumerate(plans()):
        if "split" in plan.rings and (place % 3 == 0 or any(words in plan.name for words in _UNANSWERED)):
            report = serve(plan, path, seconds=60, command=_QEMU)
            # QEMU waits for an answer in its main loop, without a deadline (docs/UPSTREAM.md).
            waits = any(words in plan.name for words in _UNANSWERED) and report.lies
            assert report.front_end in (("exit 5",) if waits else ("exit 0", "exit 3", "exit 4")), report


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The front-end in C that trusts its back-end."""
    source = peer_source("vhost_user_bench.c")
    if source is None:
        pytest.skip("the C front-end's source is not there ($SVSM_PEER_SOURCES)")
    program = tmp_path_factory.mktemp("bench") / "bench"
    subprocess.run([str(peer("cc")), "-O2", "-o", str(program), str(source)], check=True)
    return program


@pytest.mark.long
def test_one_that_trusts_hangs_where_ours_gives_up(bench: Path, path: Path) -> None:
    command = (str(bench), "{socket}", "r", "4096", "4", "0.2")
    assert serve(HONEST, path, seconds=60, command=command).front_end == "exit 0"
    for words in ("never completes", "asks for a reset", "GET_FEATURES: the back-end does not answer"):
        assert serve(_named(words), path, seconds=3, command=command).verdict == "hang"
        assert _ours(_named(words), path).verdict == "error"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--attack", "largest identifier", "--json", "--seconds", "60", "--", *_OURS]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {field.name for field in dataclasses.fields(Report)}
    assert (report["number"], report["verdict"], report["output"]) == (2, "error", "block-io virtio-used-id")
    assert main(["serve", "--attack", "no such thing"]) == 2
    assert main(["serve", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100
    assert main(["serve", "--attack", "honest", "--", "/no/such/program"]) == 1
    assert "error:" in capsys.readouterr().err


def test_the_command_runs_cells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "5", "--json", "--ring", "split"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ok"] for line in lines] == [True, True]
    assert main(["33"]) == 0
    assert "only what encrypts above can see it" in capsys.readouterr().out
