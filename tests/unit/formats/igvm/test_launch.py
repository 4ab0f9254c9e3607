# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch plan: order, page types, what a loader may fill, what is launched twice."""

from __future__ import annotations

import time

import pytest

from svsm.formats.errors import FormatError
from svsm.formats.igvm import (
    IgvmBuilder,
    IgvmFile,
    Order,
    PageDataType,
    PageFlag,
    PlatformType,
    StepKind,
    guest_policy,
    id_block_header,
    plan,
    plan_runs,
)
from svsm.formats.igvm.launch import MAX_LAUNCH_PAGES, MAX_RUN_PAGES
from svsm.formats.igvm.layout import PAGE_2MB
from svsm.formats.snp.page_info import PageType


def _builder() -> IgvmBuilder:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    return builder


def test_types_and_order() -> None:
    builder = _builder()
    builder.parameter_area(5, 0x3000)
    builder.page(0x1000, data_type=PageDataType.SECRETS)
    builder.vp_context(0xFFFFFFFFF000, b"v" * 4096, vp_index=7)
    builder.page(0x2000, b"c" * 4096, data_type=PageDataType.CPUID_XF)
    builder.parameter_insert(0x10000, index=5)
    builder.page(0x3000, b"u" * 4096, flags=PageFlag.UNMEASURED)
    builder.page(0x4000, b"s" * 4096, flags=PageFlag.SHARED)
    builder.page(0x5000)
    steps = list(plan(builder.finish()))
    vmsa = (PageType.VMSA, 0xFFFFFFFFF000, b"v" * 4096, StepKind.VMSA, 7, 0)
    others = [
        (PageType.CPUID, 0x2000, b"c" * 4096, StepKind.CPUID, 0, 0),
        (PageType.UNMEASURED, 0x10000, None, StepKind.PARAMETER, 5, 0),
        (PageType.UNMEASURED, 0x11000, None, StepKind.PARAMETER, 5, 0x1000),
        (PageType.UNMEASURED, 0x12000, None, StepKind.PARAMETER, 5, 0x2000),
        (PageType.UNMEASURED, 0x3000, b"u" * 4096, StepKind.PAGE, 0, 0),
        (None, 0x4000, b"s" * 4096, StepKind.SHARED, 0, 0),
        (PageType.NORMAL, 0x5000, None, StepKind.PAGE, 0, 0),
    ]
    secrets = (PageType.SECRETS, 0x1000, None, StepKind.SECRETS, 0, 0)
    assert [tuple(step)[:6] for step in steps] == [secrets, vmsa, *others]
    assert all(step.pages == 1 for step in steps)
    last = list(plan(builder.finish(), order=Order.KVM))
    assert [tuple(step)[:6] for step in last] == [secrets, *others, vmsa]
    zero = list(plan(builder.finish(), native_zero=True))
    assert [step.page_type for step in zero][-1] is PageType.ZERO


def test_initial_parameter_data_is_offered() -> None:
    builder = _builder()
    builder.parameter_area(0, 0x2000, b"a" * 4096 + b"b" * 4096)
    builder.parameter_insert(0x8000, index=0)
    assert [(step.gpa, step.contents) for step in plan(builder.finish())] == [
        (0x8000, memoryview(b"a" * 4096)),
        (0x9000, memoryview(b"b" * 4096)),
    ]


def test_runs_and_steps_are_the_same_launch() -> None:
    builder = _builder()
    builder.pages(0x100000, b"".join(index.to_bytes(2, "big") * 2048 for index in range(MAX_RUN_PAGES + 3)))
    file = builder.finish()
    runs = list(plan_runs(file))
    assert [run.pages for run in runs] == [MAX_RUN_PAGES, 3]
    steps = list(plan(file))
    assert len(steps) == MAX_RUN_PAGES + 3
    joined = b"".join(run.contents or b"" for run in runs)
    assert b"".join(step.contents or b"" for step in steps) == joined
    assert [step.gpa for step in steps] == [0x100000 + 4096 * index for index in range(len(steps))]
    assert len({step.source for step in steps}) == len(steps)


def test_a_2_mib_page_is_512_pages() -> None:
    builder = _builder()
    builder.page(PAGE_2MB, flags=PageFlag.IS_2MB_PAGE)
    contents = b"".join(bytes([index % 251]) * 4096 for index in range(512))
    builder.page(2 * PAGE_2MB, contents, flags=PageFlag.IS_2MB_PAGE)
    file = builder.finish()
    assert IgvmFile.parse(file.pack()).pack() == file.pack()
    steps = list(plan(file))
    assert len(steps) == 1024
    assert all(step.contents is None for step in steps[:512])
    assert b"".join(step.contents or b"" for step in steps[512:]) == contents


def test_another_platforms_headers_are_left_out() -> None:
    first = _builder()
    first.page(0, b"1" * 4096)
    image = first.finish()
    both = IgvmBuilder(mask=1)
    both.platform(PlatformType.SEV_SNP)
    other = IgvmBuilder(mask=2)
    other.platform(PlatformType.NATIVE)
    other.page(0, b"2" * 4096)
    both._headers += [other._headers[0]]
    both.page(0, b"1" * 4096)
    both._headers += [other._headers[1]]
    steps = list(plan(both.finish()))
    assert [step.contents for step in steps] == [step.contents for step in plan(image)]


def test_only_snp_is_planned() -> None:
    file = _builder().finish()
    with pytest.raises(FormatError) as caught:
        plan_runs(file, PlatformType.TDX)
    assert caught.value.code == "igvm-unsupported-platform"
    native = IgvmBuilder()
    native.platform(PlatformType.NATIVE)
    with pytest.raises(FormatError) as caught:
        plan_runs(native.finish())
    assert caught.value.code == "igvm-no-platform"


@pytest.mark.parametrize(("first", "second"), [(0x1000, 0x1000), (0x2000, 0x1000), (0x1000, 0x0000)])
def test_overlaps_are_refused_before_anything_is_launched(first: int, second: int) -> None:
    builder = _builder()
    builder.pages(first, b"x" * 8192)
    builder.parameter_area(0, 8192)
    builder.parameter_insert(second, index=0)
    with pytest.raises(FormatError) as caught:
        plan_runs(builder.finish())
    assert caught.value.code == "igvm-overlap"


def test_neighbours_do_not_overlap() -> None:
    builder = _builder()
    builder.pages(0x1000, b"x" * 8192)
    builder.parameter_area(0, 4096)
    builder.parameter_insert(0x3000, index=0)
    builder.page(0)
    assert len(list(plan(builder.finish()))) == 4


def test_too_large_a_launch_is_refused_at_once() -> None:
    builder = _builder()
    for index in range(MAX_LAUNCH_PAGES // 512 + 1):
        builder.page(index * PAGE_2MB, flags=PageFlag.IS_2MB_PAGE)
    file = builder.finish()
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        plan_runs(file)
    assert caught.value.code == "igvm-limit"
    assert time.perf_counter() - started < 0.5


def test_many_pages_in_descending_order_cost_no_more_than_in_ascending() -> None:
    builder = _builder()
    for index in reversed(range(20_000)):
        builder.page(index * 4096)
    file = builder.finish()
    started = time.perf_counter()
    assert sum(run.pages for run in plan_runs(file)) == 20_000
    assert time.perf_counter() - started < 2


def test_policy_and_id_block() -> None:
    builder = _builder()
    assert guest_policy(builder.finish()) is None
    assert id_block_header(builder.finish()) is None
    builder.policy(0x30000)
    assert guest_policy(builder.finish()) == 0x30000
    builder.policy(0x30001)
    with pytest.raises(FormatError) as caught:
        guest_policy(builder.finish())
    assert caught.value.code == "igvm-duplicate"
