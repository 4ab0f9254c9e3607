# SPDX-License-Identifier: MIT OR Apache-2.0
"""The NVMe driver over a controller in memory: conformance, vectors, life and death."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest

from svsm.formats.errors import BackendError, ProtocolError, StateError
from svsm.formats.nvme import AdminOpcode, Completion, ControllerStatus, NvmeRegister, NvmOpcode
from svsm.storage.drivers.nvme.disk import NvmePolicy, memory_bytes
from svsm.testing.block_conformance import CHECKS, Check, Subject, initial_content
from svsm.testing.nvme_model import SMALL_NVME, NvmeBench, NvmeModel, nvme_bench

_MIB = 1 << 20


def bench(size_bytes: int = _MIB, **options: object) -> NvmeBench:
    return nvme_bench(bytearray(size_bytes), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_shift", [9, 12])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: str(check.__name__))
def test_conformance(check: Check, block_shift: int) -> None:
    made: list[NvmeBench] = []

    def create(policy: NvmePolicy = SMALL_NVME) -> NvmeBench:
        made.append(nvme_bench(bytearray(initial_content()), block_shift=block_shift, policy=policy))
        return made[-1]

    check(
        Subject(
            create=lambda: create().start(),
            reopen=lambda: made[-1].start(),
            create_read_only=lambda: create(dataclasses.replace(SMALL_NVME, read_only=True)).start(),
            grow=lambda more: made[-1].model.content.extend(bytes(more)),
            create_failing=lambda: _failing(create()).start(),
        )
    )


def _failing(made: NvmeBench) -> NvmeBench:
    """Every second write or zeroing of one block is done and then called an error."""

    def answer(model: NvmeModel, queue: int, completion: Completion) -> Sequence[tuple[int, Completion]]:
        changes = [command for number, command in model.commands if number and command.opcode != NvmOpcode.READ]
        failed = queue and len(changes) % 2 == 0 and model.commands[-1][1].opcode != NvmOpcode.READ
        return [(queue, completion.replace(status=0x281 << 1) if failed else completion)]

    made.model.answer = answer
    return made


def test_transfers_of_every_number_of_pages_use_the_right_prps() -> None:
    policy = dataclasses.replace(SMALL_NVME, large_bytes=64 << 10)
    made = bench(policy=policy)
    made.model.pages[1][77] = b"\0"  # no limit but ours
    disk = made.start()
    data = random.Random(4).randbytes(64 << 10)
    for length in (512, 4096, 4608, 8192, 8704, 12288, 65024, 65536):
        made.model.content[:] = bytes(_MIB)
        disk.write([(512, data[:length])])
        assert made.model.content == bytes(512) + data[:length] + bytes(_MIB - 512 - length)
        assert disk.read([(512, length)]) == [data[:length]]
    assert {command.cdw12 + 1 for queue, command in made.model.commands if queue} >= {1, 8, 9, 128}


def test_the_transfer_limit_is_kept() -> None:
    made = bench()
    made.model.pages[1][77] = b"\1"  # 8 KiB
    disk = made.start()
    disk.write([(0, bytes(64 << 10))])
    assert {command.cdw12 + 1 for queue, command in made.model.commands if queue} == {16}


@pytest.mark.parametrize("limit", ["CAP.MQES", "MAXCMD"])
def test_the_queue_is_no_longer_than_the_controller_wants(limit: str) -> None:
    """Both are 3 here: MQES counts from 0, and a queue of four entries holds three commands."""
    made = bench()
    if limit == "MAXCMD":
        made.model.pages[1][514] = b"\3\0"
    else:
        made.model.capabilities = made.model.capabilities & ~0xFFFF | 3
    made.start()
    created = [
        command
        for queue, command in made.model.commands
        if not queue and command.opcode in (AdminOpcode.CREATE_SQ, AdminOpcode.CREATE_CQ)
    ]
    assert [command.cdw10 >> 16 for command in created] == [3, 3]


def test_a_write_protected_namespace_gets_no_write() -> None:
    made = bench()
    made.model.pages[0][99] = b"\1"
    disk = made.start()
    with pytest.raises(StateError) as caught:
        disk.write([(0, bytes(512))])
    assert caught.value.code == "block-read-only"
    assert disk.read([(0, 512)]) == [bytes(512)]


def test_completions_in_any_order() -> None:
    made = bench()
    source = random.Random(5)
    kept: list[tuple[int, Completion]] = []

    def shuffle(model: NvmeModel, queue: int, completion: Completion) -> list[tuple[int, Completion]]:
        if not queue:
            return [(queue, completion)]
        kept.append((queue, completion))
        if len(kept) < 4:
            return []
        batch = kept[:]
        kept.clear()
        head = batch[-1][1].sq_head
        source.shuffle(batch)
        return [(number, entry.replace(sq_head=head)) for number, entry in batch]

    made.model.content[:] = source.randbytes(_MIB)
    disk = made.start()
    made.model.answer = shuffle
    ranges = [(source.randrange(2000) * 512, 512) for _ in range(400)]
    assert disk.read(ranges) == [bytes(made.model.content[at : at + size]) for at, size in ranges]


def test_a_status_fails_one_call_and_not_the_disk() -> None:
    made = bench()
    disk = made.start()
    statuses = iter([0, 0x281, 0])

    def answer(model: NvmeModel, queue: int, completion: Completion) -> list[tuple[int, Completion]]:
        return [(queue, completion.replace(status=next(statuses, 0) << 1))]

    made.model.answer = answer
    with pytest.raises(BackendError, match="unrecovered read error") as caught:
        disk.read([(0, 512), (512, 512), (1024, 512)])
    assert caught.value.code == "block-io"
    assert caught.value.details["status"] == 0x281
    assert disk.fault is None
    assert disk.read([(0, 512)]) == [bytes(512)]


def test_a_read_that_was_never_done_gives_zeros_not_old_contents() -> None:
    made = bench()
    made.model.content[:] = b"\xaa" * _MIB
    disk = made.start()
    disk.read([(at * 4096, 4096) for at in range(32)])
    made.model.content[:] = b""
    made.model.answer = lambda _model, queue, completion: [(queue, completion.replace(status=0))]
    assert disk.read([(0, 4096), (4096, 8192)]) == [bytes(4096), bytes(8192)]


def test_death_and_a_second_life_in_the_other_half() -> None:
    made = bench()
    disk = made.start()
    disk.write([(0, b"\1" * 512)])
    made.model.stalled = True
    begun = made.clock.now
    with pytest.raises(BackendError) as caught:
        disk.read([(0, 512)])
    assert caught.value.details["violation"] == "nvme-timeout"
    assert 5 <= made.clock.now - begun < 6
    made.model.stalled = False
    with pytest.raises(BackendError):
        disk.read([(0, 512)])
    before = {command.prp1 for _, command in made.model.commands}
    disk.reconnect()
    with pytest.raises(BackendError, match="may be lost"):
        disk.flush()
    disk.flush()
    assert disk.read([(0, 512)]) == [b"\1" * 512]
    disk.write([(512, b"\2" * 512)])
    half = memory_bytes(SMALL_NVME) // 2
    fresh = {command.prp1 for _, command in made.model.commands} - before
    assert fresh
    assert all(address >= made.memory.address + half for address in fresh)


def test_reconnect_that_fails_leaves_it_dead() -> None:
    made = bench()
    disk = made.start()
    made.model.registers[NvmeRegister.CSTS] = lambda: 0xFFFF_FFFF
    with pytest.raises(ProtocolError, match="gone"):
        disk.reconnect()
    with pytest.raises(BackendError) as caught:
        disk.read([(0, 512)])
    assert caught.value.details["violation"] == "nvme-gone"
    disk.close()
    assert made.model.closed
    with pytest.raises(StateError):
        disk.reconnect()


def test_resize_is_seen_by_poll() -> None:
    made = bench()
    disk = made.start()
    assert not disk.poll()
    made.model.content.extend(bytes(_MIB))
    assert disk.poll()
    assert disk.size_bytes == 2 * _MIB
    assert disk.resizes == 1
    disk.write([(2 * _MIB - 512, bytes(512))])
    made.model.block_shift = 12
    with pytest.raises(BackendError) as caught:
        disk.poll()
    assert caught.value.details["violation"] == "nvme-identify"


def test_write_zeroes_and_discard_with_and_without_the_commands() -> None:
    for offered, opcodes in ((b"\x0c", {8, 9}), (b"\0", {1})):
        made = bench()
        made.model.pages[1][520] = offered
        made.model.content[:] = b"\xff" * _MIB
        disk = made.start()
        disk.write_zeroes([(512, 100 << 10)])
        assert made.model.content[512 : 512 + (100 << 10)] == bytes(100 << 10)
        assert made.model.content[:512] == b"\xff" * 512
        assert made.model.content[512 + (100 << 10)] == 0xFF
        disk.discard([(at * 1024, 512) for at in range(300, 900)])
        assert {command.opcode for queue, command in made.model.commands if queue} == opcodes
        assert made.model.content[300 * 1024 + 512] == 0xFF


def test_close_shuts_down_in_order() -> None:
    made = bench()
    disk = made.start()
    disk.write([(0, bytes(512))])
    disk.flush()
    assert made.model.flushes == 1
    disk.close()
    assert made.model.resets == 1
    assert made.model.closed
    assert not made.model.status() & ControllerStatus.RDY
    assert made.model.commands[-1][1].opcode == NvmOpcode.FLUSH


def test_memory_that_is_too_small_is_refused() -> None:
    made = bench()
    made.memory = made.memory.part(0, 16 << 10)
    with pytest.raises(StateError) as caught:
        made.start()
    assert caught.value.code == "dma-memory"
    assert made.model.closed


def test_memory_bytes_is_enough_and_not_much_more() -> None:
    for policy in (
        SMALL_NVME,
        NvmePolicy(depth=63),
        NvmePolicy(depth=1),
        NvmePolicy(depth=9, small_bytes=8192, large_bytes=12288),
    ):
        made = bench(policy=policy)
        disk = made.start()
        assert disk._memory.free_bytes < 1 << 16


@pytest.mark.parametrize(
    "change",
    [
        {"small_bytes": 512},
        {"large_bytes": 4 << 20},
        {"small_bytes": 16384, "large_bytes": 8192},
        {"depth": 0},
        {"large_slots": 0},
        {"namespace": 0},
        {"deadline_seconds": 0.0},
        {"spins": 0},
    ],
)
def test_policies_that_make_no_sense(change: dict[str, int]) -> None:
    with pytest.raises(StateError) as caught:
        dataclasses.replace(NvmePolicy(), **change).check()  # type: ignore[arg-type]
    assert caught.value.code == "nvme-policy"


def test_nothing_private_is_in_shared_memory() -> None:
    made = bench()
    disk = made.start()
    secret = b"a private neighbour of the data "
    disk.write([(0, memoryview(secret * 64)[512:1024])])
    assert made.memory.bytes.tobytes().count(secret) == 512 // len(secret)
