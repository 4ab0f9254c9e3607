# SPDX-License-Identifier: MIT OR Apache-2.0
"""Everything is killed at random moments, the disk too: no acknowledged write is lost, no boot is refused.

The disk has a volatile cache below the kernel's virtio driver (`svsm.testing.vhost_user_disk`). What was not flushed
when it died is gone, or reaches the medium in random pieces. A write that was answered must be there after the next
boot; the one that was under way may be there, whole, or not at all. SVSM_SEED repeats the choices of a run (not its
timing).
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from svsm.cli.supervisor.demonstration import guest_random
from svsm.formats import tpm
from svsm.formats.swtpm import Control
from tests.e2e.tpm_support import PowerCutDisk, System, TpmClient, folder, nv_define, nv_read, nv_write
from tests.interop.test_vtpm_tools import SCENARIO, play_guesses, swtpm_server
from tests.support import peer

__all__ = ["folder"]

pytestmark = pytest.mark.e2e

INDICES = {0x150_0010: 8, 0x150_0011: 64, 0x150_0012: 500, 0x150_0013: 1000}
"""NV indices and their sizes in bytes: the TPM's state grows to several blocks of the volume."""

_BAD = {"failed", "refused", "client-refused", "storage-failed", "no-guest", "guest-stopped"}


class Ledger:
    """What the TPM was told to keep, and what it has said that it keeps."""

    def __init__(self) -> None:
        self.kept = {index: bytes(size) for index, size in INDICES.items()}
        self.under_way: tuple[int, bytes] | None = None
        self.acknowledged = 0
        self.unexpected: bytes | None = None

    def settle(self, client: TpmClient) -> None:
        """Compare with what is there; from now on that is what is kept."""
        for index, size in INDICES.items():
            found = client.read_index(index, size)
            allowed = [self.kept[index]]
            if self.under_way is not None and self.under_way[0] == index:
                allowed.append(self.under_way[1])
            assert found in allowed, f"index {index:#x} has {found.hex()}, expected {[a.hex() for a in allowed]}"
            self.kept[index] = found
        self.under_way = None


def write_until_killed(where: Path, rng: random.Random, ledger: Ledger) -> None:
    """Random whole writes to random indices, as fast as they are answered."""
    try:
        with TpmClient(where) as client:
            while True:
                index = rng.choice(list(INDICES))
                value = rng.randbytes(INDICES[index])
                ledger.under_way = index, value
                response = client.ask(nv_write(index, value))
                while tpm.response_code(response) == 0x922:  # RETRY: the first use after a start
                    response = client.ask(nv_write(index, value))
                if tpm.response_code(response):
                    ledger.unexpected = response
                    return
                ledger.kept[index] = value
                ledger.under_way = None
                ledger.acknowledged += 1
    except OSError:
        return


class Rounds:
    """One system and its disk over many power cuts."""

    def __init__(self, folder: Path, seed: int, kind: Literal["vhost-user", "process"]) -> None:
        self.rng = random.Random(seed)
        self.disk = PowerCutDisk(folder, kind=kind)
        self.system = System(folder, "--disk", self.disk.option)
        self.ledger = Ledger()
        self.names: tuple[object, object] | None = None

    def boot(self) -> None:
        """Everything up; the same TPMs as ever; nothing complained."""
        self.disk.start()
        ready = self.system.start()
        names = ready["ek_name"], ready["guest_ek_name"]
        self.names = self.names or names
        assert names == self.names
        assert [event for event in self.system.instance.events if event["event"] in _BAD] == []

    def cut(self) -> None:
        """Power off for everything, the disk included; half of the times it tears."""
        disk = self.disk.process
        assert disk is not None
        self.system.kill(together_with=[disk.pid], rng=self.rng)
        self.disk.collect(torn=self.rng.randrange(1 << 32) if self.rng.random() < 0.5 else None)

    def cut_while_booting(self) -> None:
        """Start, and cut the power somewhere on the way."""
        self.disk.start()
        self.system.launch()
        time.sleep(self.rng.uniform(0.3, 2.0))
        self.cut()

    def prepare(self) -> None:
        """First boot; define the indices."""
        self.system.pin_image()
        self.boot()
        with TpmClient(self.system.where) as client:
            for index, size in INDICES.items():
                client.run(nv_define(index, size))
                client.run(nv_write(index, bytes(size)))

    def one(self) -> None:
        """Write until the power goes, boot again, compare."""
        writer = threading.Thread(
            target=write_until_killed,
            args=(self.system.where, random.Random(self.rng.randrange(1 << 32)), self.ledger),
        )
        writer.start()
        time.sleep(self.rng.uniform(0.02, 0.4))
        self.cut()
        writer.join(30)
        assert not writer.is_alive()
        assert self.ledger.unexpected is None or tpm.response_code(self.ledger.unexpected) == tpm.RC_FAILURE
        self.ledger.unexpected = None
        if self.rng.random() < 0.2:
            self.cut_while_booting()
        self.boot()
        with TpmClient(self.system.where) as client:
            self.ledger.settle(client)

    def close(self) -> None:
        """Leave nothing behind."""
        self.system.close()
        self.disk.collect(torn=None)


@pytest.fixture
def rounds(folder: Path, request: pytest.FixtureRequest) -> Iterator[Rounds]:
    seed = int(os.environ.get("SVSM_SEED") or secrets.randbits(32))
    print(f"SVSM_SEED={seed}")  # pytest shows it when the test fails
    made = Rounds(folder, seed, getattr(request, "param", "vhost-user"))
    yield made
    made.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.long)])
def test_acknowledged_writes_survive_power_cuts(rounds: Rounds, count: int) -> None:
    rounds.prepare()
    for _ in range(count):
        rounds.one()
    assert rounds.ledger.acknowledged > 2 * count  # the cuts came in the middle of work
    assert rounds.system.stop() == 0
    rounds.disk.collect(torn=None)
    rounds.boot()
    with TpmClient(rounds.system.where) as client:
        rounds.ledger.settle(client)


@pytest.mark.long
@pytest.mark.parametrize("rounds", ["process"], indirect=True)  # behind a device role, its death ends the whole run
def test_a_disk_that_pauses_delays_and_one_that_dies_means_failure(rounds: Rounds) -> None:
    rounds.prepare()
    disk = rounds.disk.process
    assert disk is not None
    index, value = 0x150_0011, b"\5" * 64
    with TpmClient(rounds.system.where) as client:
        os.kill(disk.pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (disk.pid, signal.SIGCONT)).start()
        started = time.monotonic()
        client.run(nv_write(index, value))
        assert time.monotonic() - started > 0.4  # there was no answer before the disk had it
        rounds.ledger.kept[index] = value
        disk.kill()
        disk.wait()
        rounds.ledger.under_way = index, b"\6" * 64
        for command in (nv_write(index, b"\6" * 64), nv_read(index, 64), tpm.get_random(8)):
            assert client.ask(command) == tpm.failure_response()
        rounds.system.instance.wait_for("storage-failed", code="block-io", seconds=10)
        with TpmClient(rounds.system.where.with_name(rounds.system.where.name + ".ctrl")) as control:
            assert control.exchange(Control.INIT.to_bytes(4, "big") + bytes(4), 4) != bytes(4)
        assert client.ask(tpm.startup()) == tpm.failure_response()
    assert len(guest_random(rounds.system.state / "run" / "guest.sock")) == 8  # it has asked for nothing to be stored
    assert rounds.system.stop() == 0
    rounds.disk.collect(torn=None)
    rounds.boot()
    with TpmClient(rounds.system.where) as client:
        rounds.ledger.settle(client)
        assert client.read_index(index, 64) == value
    assert rounds.system.stop() == 0


@pytest.mark.timeout(300)
@pytest.mark.interop
@pytest.mark.parametrize("scenario", [["guess", "kill", "guess"], pytest.param(SCENARIO, marks=pytest.mark.long)])
def test_the_dictionary_attack_counter_moves_as_swtpms(folder: Path, scenario: list[str]) -> None:
    peer("swtpm")
    for name in ("ours", "theirs"):
        (folder / name).mkdir()
    theirs = play_guesses(folder / "theirs", lambda: swtpm_server(folder / "theirs"), scenario, orderly=False)
    system = System(folder / "ours")
    system.pin_image()

    def start() -> System:
        system.start()
        return system

    try:
        ours = play_guesses(folder / "ours", start, scenario, orderly=True)
    finally:
        system.close()
    assert ours == theirs
    counters = [step[1][0x20E] for step in ours if isinstance(step, tuple)]
    assert max(counters) >= 2  # the scenario did count
