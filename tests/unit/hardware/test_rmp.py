# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reverse map table, rule by rule: one row, one rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from svsm.formats.snp.hardware_messages import InstructionCode
from svsm.hardware.rmp import (
    HYPERVISOR,
    LARGE_PAGE,
    PAGE,
    Change,
    Entry,
    Home,
    Outcome,
    Region,
    ReverseMap,
    UpdateCode,
)

BASE = 0x4000_0000
ASSIGNED = Entry(assigned=True)
VALID = Entry(assigned=True, validated=True)
LARGE = Entry(assigned=True, large=True)
LARGE_VALID = Entry(assigned=True, validated=True, large=True)
IMMUTABLE = Entry(assigned=True, immutable=True)
OPEN = Entry(assigned=True, validated=True, permissions=(0, 15, 0))
VMSA = Entry(assigned=True, validated=True, vmsa=True)
RWX2 = 2 | 0xF00


def table(*, small: Entry | None = None, large: Entry | None = None) -> ReverseMap:
    made = ReverseMap([Region(BASE, 4 * LARGE_PAGE)])
    if small is not None:
        made.commit(Change(BASE, PAGE, HYPERVISOR, small, False))
    if large is not None:
        made.commit(Change(BASE, LARGE_PAGE, HYPERVISOR, large, False))
    return made


def settled(made: ReverseMap, outcome: Outcome) -> Entry:
    """The entry after the outcome's change was carried out."""
    if outcome.change is not None:
        made.commit(outcome.change)
    return made.entry(BASE)


@pytest.mark.parametrize(
    ("entry", "home"),
    [
        (HYPERVISOR, Home.SHARED),
        (ASSIGNED, Home.PRIVATE),
        (IMMUTABLE, Home.PRIVATE),
        (VALID, Home.PRIVATE),
        (OPEN, Home.VMPL2),
        (dataclasses.replace(OPEN, vmsa=True), Home.PRIVATE),
        (dataclasses.replace(OPEN, validated=False), Home.PRIVATE),
        (dataclasses.replace(VALID, permissions=(15, 0, 15)), Home.PRIVATE),
        (dataclasses.replace(VALID, permissions=(0, 1, 0)), Home.VMPL2),
    ],
)
def test_home_of_a_page(entry: Entry, home: Home) -> None:
    assert entry.home is home


@pytest.mark.parametrize(
    ("before", "assign", "code", "after"),
    [
        (HYPERVISOR, True, UpdateCode.SUCCESS, ASSIGNED),
        (HYPERVISOR, False, UpdateCode.SUCCESS, HYPERVISOR),
        (ASSIGNED, False, UpdateCode.SUCCESS, HYPERVISOR),
        (ASSIGNED, True, UpdateCode.SUCCESS, ASSIGNED),
        (IMMUTABLE, False, UpdateCode.FAIL_PERMISSION, IMMUTABLE),
        (IMMUTABLE, True, UpdateCode.FAIL_PERMISSION, IMMUTABLE),
    ],
)
def test_rmpupdate_by_the_host(before: Entry, assign: bool, code: int, after: Entry) -> None:
    made = table(small=before)
    outcome = made.plan_update(BASE, PAGE, assign=assign)
    assert outcome.code == code
    assert settled(made, outcome) == after
    if outcome.change is not None:
        assert outcome.change.zero
        assert not outcome.change.takes_validated


@pytest.mark.parametrize("entry", [VALID, OPEN, VMSA])
@pytest.mark.parametrize("assign", [True, False])
def test_taking_a_validated_page_says_so(entry: Entry, assign: bool) -> None:
    change = table(small=entry).plan_update(BASE, PAGE, assign=assign).change
    assert change is not None
    assert change.takes_validated


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(BASE + 1, PAGE), (BASE + PAGE, LARGE_PAGE), (BASE, 8192), (BASE, 0), (0, PAGE), (BASE + 4 * LARGE_PAGE, PAGE)],
)
def test_rmpupdate_of_what_is_no_page(gpa: int, size: int) -> None:
    assert table().plan_update(gpa, size, assign=True).code == UpdateCode.FAIL_INPUT


def test_rmpupdate_of_2m_over_an_assigned_4k_page_overlaps() -> None:
    assert table(small=ASSIGNED).plan_update(BASE, LARGE_PAGE, assign=True).code == UpdateCode.FAIL_OVERLAP


def test_rmpupdate_of_a_running_vmsa_is_in_use() -> None:
    made = table(small=VMSA)
    made.set_in_use(BASE, in_use=True)
    assert made.plan_update(BASE, PAGE, assign=False).code == UpdateCode.FAIL_INUSE
    made.set_in_use(BASE, in_use=False)
    assert made.plan_update(BASE, PAGE, assign=False).code == UpdateCode.SUCCESS


@pytest.mark.parametrize(
    ("before", "validate", "code", "carry", "after"),
    [
        (ASSIGNED, True, InstructionCode.SUCCESS, False, VALID),
        (ASSIGNED, False, InstructionCode.SUCCESS, True, ASSIGNED),
        (VALID, True, InstructionCode.SUCCESS, True, VALID),
        (VALID, False, InstructionCode.SUCCESS, False, ASSIGNED),
        (OPEN, False, InstructionCode.SUCCESS, False, ASSIGNED),
        (OPEN, True, InstructionCode.SUCCESS, True, OPEN),
        (HYPERVISOR, True, InstructionCode.NESTED_FAULT, False, HYPERVISOR),
        (IMMUTABLE, True, InstructionCode.NESTED_FAULT, False, IMMUTABLE),
    ],
)
def test_pvalidate(before: Entry, validate: bool, code: int, carry: bool, after: Entry) -> None:
    made = table(small=before)
    outcome = made.plan_pvalidate(BASE, PAGE, validate=validate)
    assert (outcome.code, outcome.carry) == (code, carry)
    if outcome.change is not None:
        assert outcome.change.zero
    assert settled(made, outcome) == after


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        (RWX2, InstructionCode.SUCCESS),
        (RWX2 | 1 << 16, InstructionCode.SUCCESS),
        (0xF00, InstructionCode.FAIL_PERMISSION),
        (4 | 0xF00, InstructionCode.FAIL_INPUT),
        (RWX2 | 1 << 12, InstructionCode.FAIL_INPUT),
        (RWX2 | 1 << 17, InstructionCode.FAIL_INPUT),
        (RWX2 | 1 << 63, InstructionCode.FAIL_INPUT),
    ],
)
def test_rmpadjust_attributes(attributes: int, code: int) -> None:
    assert table(small=VALID).plan_rmpadjust(BASE, PAGE, attributes).code == code


@pytest.mark.parametrize(
    ("before", "code"),
    [
        (HYPERVISOR, InstructionCode.NESTED_FAULT),
        (ASSIGNED, InstructionCode.NESTED_FAULT),
        (IMMUTABLE, InstructionCode.NESTED_FAULT),
        (VALID, InstructionCode.SUCCESS),
    ],
)
def test_rmpadjust_needs_a_validated_page(before: Entry, code: int) -> None:
    assert table(small=before).plan_rmpadjust(BASE, PAGE, RWX2).code == code


def test_rmpadjust_changes_one_level_and_keeps_the_contents() -> None:
    made = table(small=VALID)
    for vmpl, mask in ((1, 0x1), (2, 0x3), (3, 0x5)):
        outcome = made.plan_rmpadjust(BASE, PAGE, vmpl | mask << 8)
        assert outcome.change is not None
        assert not outcome.change.zero
        made.commit(outcome.change)
    assert made.entry(BASE).permissions == (1, 3, 5)
    assert made.plan_rmpadjust(BASE, PAGE, 2 | 3 << 8).change is None


def test_a_vmsa_is_4k_and_may_not_change_while_it_runs() -> None:
    assert table(large=LARGE_VALID).plan_rmpadjust(BASE, LARGE_PAGE, 2 | 1 << 16).code == InstructionCode.FAIL_INPUT
    made = table(small=VMSA)
    made.set_in_use(BASE, in_use=True)
    assert made.plan_rmpadjust(BASE, PAGE, RWX2).code == InstructionCode.FAIL_INUSE
    assert made.plan_pvalidate(BASE, PAGE, validate=False).code == InstructionCode.FAIL_INUSE


@pytest.mark.parametrize("size", [PAGE, LARGE_PAGE])
@pytest.mark.parametrize("offset", [1, 0xFFF])
def test_instructions_on_misaligned_addresses(size: int, offset: int) -> None:
    made = table(large=LARGE_VALID)
    assert made.plan_pvalidate(BASE + offset, size, validate=True).code == InstructionCode.FAIL_INPUT
    assert made.plan_rmpadjust(BASE + offset, size, RWX2).code == InstructionCode.FAIL_INPUT


def test_instructions_outside_memory_fault() -> None:
    made = table()
    assert made.plan_pvalidate(0, PAGE, validate=True).code == InstructionCode.NESTED_FAULT
    assert made.plan_rmpadjust(0, PAGE, RWX2).code == InstructionCode.NESTED_FAULT


def test_2m_instruction_on_4k_pages_is_a_size_mismatch() -> None:
    made = ReverseMap([Region(BASE, LARGE_PAGE)])
    made.commit(Change(BASE, LARGE_PAGE, HYPERVISOR, ASSIGNED, False))
    assert made.plan_pvalidate(BASE, LARGE_PAGE, validate=True).code == InstructionCode.FAIL_SIZEMISMATCH
    assert made.plan_rmpadjust(BASE, LARGE_PAGE, RWX2).code == InstructionCode.FAIL_SIZEMISMATCH
    made.commit(Change(BASE + PAGE, PAGE, ASSIGNED, HYPERVISOR, False))
    assert made.plan_pvalidate(BASE, LARGE_PAGE, validate=True).code == InstructionCode.NESTED_FAULT


def test_4k_instruction_splits_a_2m_page() -> None:
    made = table(large=LARGE)
    outcome = made.plan_pvalidate(BASE + 5 * PAGE, PAGE, validate=True)
    assert outcome.code == InstructionCode.SUCCESS
    assert outcome.change is not None
    made.commit(outcome.change)
    assert made.entry(BASE + 5 * PAGE) == VALID
    assert made.entry(BASE) == ASSIGNED
    assert made.entry(BASE + LARGE_PAGE - PAGE) == ASSIGNED
    assert sum(length for _, length, _ in made.extents()) == LARGE_PAGE


def test_2m_page_through_its_life() -> None:
    made = table()
    steps: list[tuple[Callable[[], Outcome], Entry]] = [
        (lambda: made.plan_update(BASE, LARGE_PAGE, assign=True), LARGE),
        (lambda: made.plan_pvalidate(BASE, LARGE_PAGE, validate=True), LARGE_VALID),
        (
            lambda: made.plan_rmpadjust(BASE, LARGE_PAGE, RWX2),
            dataclasses.replace(LARGE_VALID, permissions=(0, 15, 0)),
        ),
        (lambda: made.plan_pvalidate(BASE, LARGE_PAGE, validate=False), LARGE),
        (lambda: made.plan_update(BASE, LARGE_PAGE, assign=False), HYPERVISOR),
    ]
    for outcome, expected in steps:
        planned = outcome()
        assert planned.code == 0
        assert settled(made, planned) == expected
    assert not list(made.extents())


def test_launch_pages_are_immutable_until_they_are_the_guests() -> None:
    made = table()
    outcome = made.plan_pre_guest(BASE, 3 * PAGE)
    assert outcome.change is not None
    made.commit(outcome.change)
    assert made.plan_update(BASE, PAGE, assign=False).code == UpdateCode.FAIL_PERMISSION
    assert made.plan_pre_guest(BASE + PAGE, PAGE).code == UpdateCode.FAIL_OVERLAP
    made.commit(made.plan_guest_valid(outcome.change, permissions=(0, 0, 0), vmsa=False))
    assert made.entry(BASE + 2 * PAGE) == VALID
    assert made.plan_pre_guest(BASE + 1, PAGE).code == UpdateCode.FAIL_INPUT
    assert made.plan_pre_guest(BASE + 4 * LARGE_PAGE - PAGE, 2 * PAGE).code == UpdateCode.FAIL_INPUT


def test_shared_ranges() -> None:
    made = table(small=ASSIGNED)
    assert not made.is_shared(BASE, PAGE)
    assert not made.is_shared(BASE + PAGE - 1, 2)
    assert made.is_shared(BASE + PAGE, PAGE)
    assert not made.is_shared(BASE - PAGE, PAGE)
    assert not made.is_shared(BASE + PAGE, 0)
