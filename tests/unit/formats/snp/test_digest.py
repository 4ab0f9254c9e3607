# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch digest chain against PAGE_INFO built field by field."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError
from svsm.formats.snp.digest import LaunchDigest
from svsm.formats.snp.page_info import INITIAL_DIGEST, PageInfo, PageType


@dataclasses.dataclass(frozen=True)
class _Run:
    page_type: PageType | None
    gpa: int
    contents: bytes | None
    source: int
    pages: int


def _model(value: bytes, page_type: PageType, gpa: int, contents: bytes | None) -> bytes:
    measured = page_type in (PageType.NORMAL, PageType.VMSA)
    digest = hashlib.sha384(contents or bytes(4096)).digest() if measured else bytes(48)
    page_info = PageInfo(value, digest, 0x70, page_type, 0, 0, 0, 0, 0, gpa)
    return hashlib.sha384(page_info.pack()).digest()


def test_page_info_is_112_bytes() -> None:
    assert PageInfo.SIZE == 112


@pytest.mark.parametrize("page_type", PageType)
@pytest.mark.parametrize("contents", [None, b"\x01" * 4096, bytes(4096)])
def test_update(page_type: PageType, contents: bytes | None) -> None:
    digest = LaunchDigest()
    digest.update(page_type, 0x12345000, contents)
    first = _model(INITIAL_DIGEST, page_type, 0x12345000, contents)
    assert digest.value == first
    digest.update(page_type, 0xFFFFFFFFF000, contents)
    assert digest.value == _model(first, page_type, 0xFFFFFFFFF000, contents)


def test_starts_at_zero_or_where_told() -> None:
    assert LaunchDigest().value == bytes(48)
    assert LaunchDigest(b"a" * 48).value == b"a" * 48
    for length in (0, 47, 49):
        with pytest.raises(FormatError) as caught:
            LaunchDigest(bytes(length))
        assert caught.value.code == "digest-length"


@pytest.mark.parametrize("gpa", [1, 0xFFF, -4096, 1 << 64])
def test_bad_addresses(gpa: int) -> None:
    digest = LaunchDigest()
    with pytest.raises(FormatError) as caught:
        digest.update(PageType.NORMAL, gpa, None)
    assert caught.value.code == "digest-page"
    with pytest.raises(FormatError):
        digest.extend([_Run(PageType.NORMAL, gpa, None, 0, 1)])
    assert digest.value == INITIAL_DIGEST


def test_a_run_past_the_end_of_the_address_space() -> None:
    LaunchDigest().extend([_Run(PageType.ZERO, 2**64 - 4096, None, 0, 1)])
    with pytest.raises(FormatError):
        LaunchDigest().extend([_Run(PageType.ZERO, 2**64 - 4096, None, 0, 2)])


@pytest.mark.parametrize("length", [0, 1, 4095, 4097, 8192])
def test_contents_of_another_size(length: int) -> None:
    digest = LaunchDigest()
    with pytest.raises(FormatError) as caught:
        digest.update(PageType.NORMAL, 0, bytes(length))
    assert caught.value.code == "digest-page"
    with pytest.raises(FormatError):
        digest.extend([_Run(PageType.VMSA, 0, bytes(length), 0, 1)])


_runs = st.lists(
    st.tuples(
        st.sampled_from([*PageType, None]), st.integers(0, 2**40), st.integers(1, 4), st.booleans(), st.integers(0, 3)
    ),
    max_size=8,
)


@given(_runs)
def test_extend_is_update_page_by_page(shapes: list[tuple[PageType | None, int, int, bool, int]]) -> None:
    """Runs of any kind, with equal sources where contents are equal."""
    fast, slow, runs = LaunchDigest(), LaunchDigest(), []
    for page_type, page, pages, empty, fill in shapes:
        contents = None if empty else bytes([fill]) * 4096 * pages
        runs.append(_Run(page_type, page * 4096, contents, 0 if empty else fill, pages))
        if page_type is not None:
            for index in range(pages):
                part = None if contents is None else contents[index * 4096 : (index + 1) * 4096]
                slow.update(page_type, (page + index) * 4096, part)
    fast.extend(runs)
    assert fast.value == slow.value
    known: dict[tuple[int, int], list[bytes]] = {}
    for _ in range(2):
        again = LaunchDigest()
        again.extend(runs, known=known)
        assert again.value == slow.value


def test_type_address_and_order_count() -> None:
    page = b"p" * 4096
    values = set()
    for steps in (
        [(PageType.NORMAL, 0, page)],
        [(PageType.VMSA, 0, page)],
        [(PageType.NORMAL, 4096, page)],
        [(PageType.UNMEASURED, 0, page)],
        [(PageType.ZERO, 0, page)],
        [(PageType.NORMAL, 0, page), (PageType.ZERO, 4096, None)],
        [(PageType.ZERO, 4096, None), (PageType.NORMAL, 0, page)],
    ):
        digest = LaunchDigest()
        for step in steps:
            digest.update(*step)
        values.add(digest.value)
    assert len(values) == 7
