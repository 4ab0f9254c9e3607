# SPDX-License-Identifier: MIT OR Apache-2.0
"""Lies about registers: what a device, or whoever sits between it and its driver, answers instead of the truth."""

from __future__ import annotations

from collections.abc import Callable

from svsm.formats.virtio import MmioRegister

__all__ = ["ReadHook", "RegisterLies"]

ReadHook = Callable[[int, int], int]
"""(offset, honest value) → what the driver gets to read."""


class RegisterLies:
    """What register attacks are made of; whoever reads registers asks `lied`.

    Attributes:
        on_read: Answers instead of the registers.
        reads: How often each register was read.
        deaf: Ignore kicks.
        stuck: Ignore resets.
    """

    _feature_select: list[int]
    """Which words of the features the driver has selected: the device's, its own."""

    def forget_lies(self) -> None:
        """Be honest."""
        self.on_read: ReadHook | None = None
        self.deaf = False
        self.stuck = False

    def lied(self, offset: int, honest: int) -> int:
        """The register's value, or the lie."""
        self.reads[offset] = self.reads.get(offset, 0) + 1
        return honest if self.on_read is None else self.on_read(offset, honest)

    reads: dict[int, int]

    def lie_at(self, offset: int, *values: int) -> None:
        """Answer a register with `values` one after the other; the last one stays."""
        answers = list(values)
        before = self.on_read

        def lie(at: int, honest: int) -> int:
            if at == offset:
                return answers.pop(0) if len(answers) > 1 else answers[0]
            return honest if before is None else before(at, honest)

        self.on_read = lie

    def lie_about_features(self, *, add: int = 0, remove: int = 0) -> None:
        """Change the offer, not what the device then accepts."""

        def lie(at: int, honest: int) -> int:
            if at != MmioRegister.DEVICE_FEATURES:
                return honest
            shift = 32 * self._feature_select[0]
            return (honest | add >> shift) & ~(remove >> shift) & 0xFFFF_FFFF

        self.on_read = lie

    def lie_about_config(self, offset: int, value: int, width: int) -> None:
        """Change a field of the configuration space; `offset` and `width` in bytes."""

        def lie(at: int, honest: int) -> int:
            start = at - MmioRegister.CONFIG
            if start < 0 or not start < offset + width or not offset < start + 4:
                return honest
            word = bytearray(honest.to_bytes(4, "little"))
            field = value.to_bytes(width, "little")
            for index in range(4):
                if offset <= start + index < offset + width:
                    word[index] = field[start + index - offset]
            return int.from_bytes(word, "little")

        self.on_read = lie
