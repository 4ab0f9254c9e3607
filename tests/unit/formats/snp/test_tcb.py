# SPDX-License-Identifier: MIT OR Apache-2.0
"""TCB versions: layouts per product line, and comparison per component."""

from __future__ import annotations

import pytest

from svsm.formats.errors import FormatError
from svsm.formats.snp.tcb import Line, Tcb, line_of_cpuid


def test_each_line_has_its_layout() -> None:
    data = bytes([1, 2, 0, 0, 0, 0, 7, 8])
    for line in (Line.MILAN, Line.GENOA):
        assert Tcb.parse(data, line) == Tcb(bootloader=1, tee=2, snp=7, microcode=8)
        assert Tcb.parse(data, line).pack(line) == data
    data = bytes([1, 2, 3, 4, 0, 0, 0, 8])
    assert Tcb.parse(data, Line.TURIN) == Tcb(fmc=1, bootloader=2, tee=3, snp=4, microcode=8)
    assert Tcb.parse(data, Line.TURIN).pack(Line.TURIN) == data


@pytest.mark.parametrize(
    ("line", "reserved"), [(Line.MILAN, {2, 3, 4, 5}), (Line.GENOA, {2, 3, 4, 5}), (Line.TURIN, {4, 5, 6})]
)
def test_reserved_bytes_are_zero(line: Line, reserved: set[int]) -> None:
    for place in range(8):
        data = bytes(1 if i == place else 0 for i in range(8))
        if place in reserved:
            with pytest.raises(FormatError) as refused:
                Tcb.parse(data, line)
            assert refused.value.code == "report-tcb"
        else:
            Tcb.parse(data, line)


@pytest.mark.parametrize("length", [0, 7, 9])
def test_a_tcb_has_eight_bytes(length: int) -> None:
    with pytest.raises(FormatError):
        Tcb.parse(bytes(length), Line.MILAN)


def test_comparison_is_per_component() -> None:
    # As one integer the second is greater, by its microcode; its boot loader is older all the same.
    minimum, newer_microcode = Tcb(3, 0, 8, 115), Tcb(2, 0, 8, 206)
    assert int.from_bytes(newer_microcode.pack(Line.MILAN), "little") > int.from_bytes(
        minimum.pack(Line.MILAN), "little"
    )
    assert newer_microcode.below(minimum) == ["bootloader"]
    assert not newer_microcode.at_least(minimum)
    assert Tcb(3, 0, 8, 115).at_least(minimum)
    with pytest.raises(TypeError):
        assert minimum < newer_microcode  # type: ignore[operator]


def test_a_component_that_is_missing_is_below_any_minimum() -> None:
    assert Tcb(3, 0, 8, 115).below({"fmc": 0, "snp": 8}) == ["fmc"]
    assert Tcb(3, 0, 8, 115).at_least({"snp": 8})


def test_packing_refuses_what_has_no_place() -> None:
    with pytest.raises(FormatError):
        Tcb(1, 2, 3, 4, fmc=5).pack(Line.MILAN)
    with pytest.raises(FormatError):
        Tcb(1, 2, 3, 4).pack(Line.TURIN)
    with pytest.raises(FormatError):
        Tcb(256, 0, 0, 0).pack(Line.MILAN)


@pytest.mark.parametrize(
    ("family", "model", "line"),
    [
        (0x19, 0x00, Line.MILAN),
        (0x19, 0x0F, Line.MILAN),
        (0x19, 0x10, Line.GENOA),
        (0x19, 0x1F, Line.GENOA),
        (0x19, 0x20, None),
        (0x19, 0x9F, None),
        (0x19, 0xA0, Line.GENOA),
        (0x19, 0xAF, Line.GENOA),
        (0x19, 0xB0, None),
        (0x1A, 0x00, Line.TURIN),
        (0x1A, 0x11, Line.TURIN),
        (0x1A, 0x12, None),
        (0x17, 0x31, None),
    ],
)
def test_cpuid_names_the_line(family: int, model: int, line: Line | None) -> None:
    assert line_of_cpuid(family, model) is line
