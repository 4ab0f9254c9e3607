# SPDX-License-Identifier: MIT OR Apache-2.0
"""TCB versions: which security patch level each firmware component has.

The eight bytes mean different things on different products, and the microcode byte is the most significant one on
all of them, so comparing two TCB versions as integers gives nonsense: a fixed boot loader loses against a newer
microcode. A `Tcb` therefore has no order; `Tcb.at_least` compares component by component, and bytes become a `Tcb`
only together with the product line that says where each component is (AMD 57230 table 3; AMD 56860 §2.2).
"""

from __future__ import annotations

import dataclasses
import enum

from svsm.formats.errors import FormatError

__all__ = ["Line", "Tcb", "line_of_cpuid"]


class Line(enum.StrEnum):
    """A product line: it has its own root key, and its own TCB layout."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"

    @property
    def has_fmc(self) -> bool:
        """Whether the first TCB byte is the FMC, which moves the others, and chip ids have 8 bytes."""
        return self is Line.TURIN

    @property
    def chip_id_bytes(self) -> int:
        """How many bytes of CHIP_ID the chip uses; the remainder is zero."""
        return 8 if self.has_fmc else 64


# Where each component is. Everything else in the eight bytes is reserved, zero.
_PLACES: dict[bool, dict[str, int]] = {
    False: {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    True: {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}

# Model ranges by family, both ends included (AMD 56860 §2; 57230 appendix).
_MODELS: tuple[tuple[int, int, int, Line], ...] = (
    (0x19, 0x00, 0x0F, Line.MILAN),
    (0x19, 0x10, 0x1F, Line.GENOA),
    (0x19, 0xA0, 0xAF, Line.GENOA),
    (0x1A, 0x00, 0x11, Line.TURIN),
)


def line_of_cpuid(family: int, model: int) -> Line | None:
    """The product line of a combined CPUID family and model, None when it is not one we know the roots of."""
    for known_family, first, last, line in _MODELS:
        if family == known_family and first <= model <= last:
            return line
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Tcb:
    """One security patch level per component, 0 to 255. Deliberately without order."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None
    """Only where the product line has one."""

    @classmethod
    def parse(cls, data: bytes, line: Line) -> Tcb:
        """Decode a TCB_VERSION (8 bytes) of `line`.

        Raises:
            FormatError: ``report-tcb`` for a wrong length or a reserved byte that is not zero.
        """
        places = _PLACES[line.has_fmc]
        if len(data) != 8 or any(data[i] for i in range(8) if i not in places.values()):
            raise FormatError(
                "a TCB version has reserved bytes set", code="report-tcb", got=bytes(data), line=str(line)
            )
        return cls(**{name: data[place] for name, place in places.items()})

    def pack(self, line: Line) -> bytes:
        """Encode to the 8 bytes of `line`.

        Raises:
            FormatError: ``report-tcb`` when a component does not fit its byte, or FMC and product line disagree.
        """
        data = bytearray(8)
        if (self.fmc is not None) != line.has_fmc:
            raise FormatError("only Turin has an FMC level", code="report-tcb", line=str(line))
        for name, place in _PLACES[line.has_fmc].items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value <= 0xFF:
                raise FormatError("a TCB component does not fit its byte", code="report-tcb", field=name)
            data[place] = value
        return bytes(data)

    def components(self) -> dict[str, int]:
        """The components that this TCB has, by name."""
        values = {"bootloader": self.bootloader, "tee": self.tee, "snp": self.snp, "microcode": self.microcode}
        return values if self.fmc is None else {"fmc": self.fmc, **values}

    def below(self, minimum: Tcb | dict[str, int]) -> list[str]:
        """The names of the components that are lower than in `minimum`; a component that is missing here counts.

        Args:
            minimum: Another TCB, or only the components that matter, by name.
        """
        mine = self.components()
        wanted = minimum.components() if isinstance(minimum, Tcb) else minimum
        return [name for name, level in wanted.items() if mine.get(name, -1) < level]

    def at_least(self, minimum: Tcb | dict[str, int]) -> bool:
        """Whether no component is lower than in `minimum`."""
        return not self.below(minimum)

    def __str__(self) -> str:
        return " ".join(f"{name}={level}" for name, level in self.components().items())
