# SPDX-License-Identifier: MIT OR Apache-2.0
"""A queue pair by itself, and whatever bytes a controller can put into it."""

from __future__ import annotations

import mmap
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsm.formats.errors import ProtocolError, StateError, SvsmError
from svsm.formats.nvme import Completion, Submission
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.queue import QueuePair
from svsm.testing.block_conformance import initial_content
from svsm.testing.nvme_model import NvmeModel, nvme_bench

_COMMAND = (2 | 1 << 32, 0x1000, 0x2000, 7 | 8 << 32, 9, 10 | 11 << 32)


def pair(entries: int = 4) -> tuple[QueuePair, memoryview]:
    view = memoryview(mmap.mmap(-1, 64 << 10))
    return QueuePair(DmaMemory(view, address=1 << 40), identifier=1, entries=entries), view


def put(
    made: QueuePair, view: memoryview, index: int, *, phase: int, slot: int, status: int = 0, head: int = 0
) -> None:
    at = made.completions - (1 << 40) + 16 * index
    view[at : at + 16] = Completion(5, 0, head, 1, slot, status << 1 | phase).pack()


def test_a_command_is_stored_as_the_specification_says() -> None:
    made, view = pair()
    made.submit(2, _COMMAND)
    at = made.submissions - (1 << 40)
    command = Submission.parse(view[at : at + 64])
    assert (command.opcode, command.command_id, command.namespace) == (2, 2, 1)
    assert (command.prp1, command.prp2, command.cdw10, command.cdw11) == (0x1000, 0x2000, 7, 8)
    assert (command.cdw12, command.cdw13, command.cdw14, command.cdw15) == (9, 0, 10, 11)
    assert made.tail == 1


def test_phases_over_many_rounds() -> None:
    made, view = pair()
    for turn in range(40):
        made.submit(turn % 3, _COMMAND)
        assert not made.collect()
        assert not made.pending()
        put(made, view, turn % 4, phase=1 - turn // 4 % 2, slot=turn % 3, status=turn, head=(turn + 1) % 4)
        assert made.collect() == [(turn % 3, turn)]
        assert made.results[turn % 3] == 5
    assert made.in_flight == 0


def test_broken_stays_broken() -> None:
    made, view = pair()
    made.submit(0, _COMMAND)
    put(made, view, 0, phase=1, slot=3)
    for call in (made.collect, made.collect, lambda: made.submit(1, _COMMAND)):
        with pytest.raises(ProtocolError) as caught:
            call()
        assert caught.value is made.broken
        assert caught.value.code == "nvme-completion-id"


def test_no_more_is_collected_than_is_in_flight() -> None:
    made, view = pair()
    made.submit(0, _COMMAND)
    put(made, view, 0, phase=1, slot=0, head=1)
    put(made, view, 1, phase=1, slot=0, head=1)
    assert made.collect() == [(0, 0)]
    with pytest.raises(ProtocolError) as caught:
        made.submit(1, _COMMAND)
    assert caught.value.code == "nvme-completion-unexpected"


def test_slots_are_checked() -> None:
    made, _ = pair()
    made.submit(0, _COMMAND)
    for slot in (0, 3, -1):
        with pytest.raises(StateError):
            made.submit(slot, _COMMAND)
    for entries in (0, 1, 65537):
        with pytest.raises(StateError):
            pair(entries)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 3))
def test_any_completion_ring_is_judged(ring: bytes, flying: int) -> None:
    made, view = pair()
    for slot in range(flying):
        made.submit(slot, _COMMAND)
    at = made.completions - (1 << 40)
    view[at : at + 64] = ring
    taken: Counter[int] = Counter()
    codes: list[str] = []
    try:
        for _ in range(5):
            taken.update(slot for slot, _ in made.collect())
    except SvsmError as error:
        codes.append(error.code)
    assert all(code.startswith("nvme-completion-") for code in codes)
    assert all(count == 1 and slot < flying for slot, count in taken.items())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.binary(min_size=16, max_size=16), st.booleans()), max_size=6))
def test_any_mixture_of_completions_ends_in_data_or_an_error(changes: list[tuple[int, bytes, bool]]) -> None:
    """Replace, or add before, some of the completions of a disk's life."""
    content = initial_content(32 << 10)
    bench = nvme_bench(bytearray(content))
    plan = {number: (data, instead) for number, data, instead in changes}
    count = [0]
    codes: list[str] = []

    def answer(model: NvmeModel, queue: int, completion: Completion) -> list[tuple[int, Completion]]:
        count[0] += 1
        if count[0] not in plan:
            return [(queue, completion)]
        data, instead = plan[count[0]]
        made = [(queue, Completion.parse(data))]
        return made if instead else [*made, (queue, completion)]

    bench.model.answer = answer
    try:
        disk = bench.start()
        for at in range(0, 32 << 10, 4096):
            got = disk.read([(at, 4096), (at, 512)])
            assert got == [content[at : at + 4096], content[at : at + 512]]
        disk.flush()
    except SvsmError as error:
        codes.append(error.code)
    assert all(code.startswith("nvme-") or code == "block-io" for code in codes)
