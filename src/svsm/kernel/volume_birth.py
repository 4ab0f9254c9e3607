# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume's first format: when a blank disk may be formatted, and when the volume stops being new.

The broker's signed row state decides, never the disk alone: the host owns the disk, and a blank one in place of a
used one must not make the kernel start afresh. While the row is *new*,

* a disk that opens with the key is used as it is (an earlier first boot died before its report);
* one that carries a magic but does not open is somebody's volume, and is left alone;
* one that only announces exactly the volume that a first format makes here, with this volume's salt, is formatted:
  nothing is on it yet, or a first format was interrupted;
* one without any magic is formatted.

Once first state is durable the kernel reports (session, counter, root), and until the broker's authenticated
acknowledgement of exactly that is there, no TPM answer leaves: otherwise a clone that also holds a *new* token could
hand out other state. That report needs the run-time channel, so behind a foreign proxy a new volume is refused
before its disk is touched.

Pure rules; the disk is behind `DiskProbe`, the wire behind `svsm.kernel.runtime_channel`.
"""

from __future__ import annotations

import enum
from typing import Protocol

from svsm.abi.errors import PolicyError, StateError, SvsmError
from svsm.crypto.digests import equal
from svsm.formats.release_token import VolumeState
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged, Refused

__all__ = ["Action", "Birth", "DiskProbe"]


class Action(enum.Enum):
    """What to do with the disk."""

    USE = "use"
    FORMAT = "format"


class DiskProbe(Protocol):
    """The disk, as far as these rules look at it. Neither call writes."""

    def try_open(self) -> SvsmError | None:
        """Open with the volume key and keep it open: None, or why it does not open. Raises `BackendError` when the
        disk cannot be read at all, `StateError` when the key fits and what the disk holds is not settled."""

    def has_magic(self) -> bool:
        """Whether the disk carries a CocoonFS magic or a creation magic."""

    def announces_ours(self) -> bool:
        """Whether it only announces a volume, and exactly the one that a first format makes here."""


class Birth:
    """The rule for one boot.

    Args:
        state: The row state in the verified token.
        session: The attestation's session, 16 bytes.
        can_report: Whether there is a run-time channel (no foreign proxy).
    """

    def __init__(self, *, state: VolumeState, session: bytes, can_report: bool) -> None:
        self._state = state
        self._session = session
        self._can_report = can_report
        self._decided = False
        self._reported: Formatted | None = None
        self._acknowledged = False

    @property
    def must_report(self) -> bool:
        """Whether `formatted` has to be sent before anything leaves."""
        return self._state is VolumeState.NEW and not self._acknowledged

    def decide(self, disk: DiskProbe) -> Action:
        """Use the disk, format it, or refuse.

        Raises:
            PolicyError: ``birth-foreign-proxy``, ``birth-somebodys-volume``, ``birth-no-volume``,
                ``birth-other-volume``.
            BackendError, StateError: From the disk.
        """
        if self._state is VolumeState.NEW and not self._can_report:
            raise PolicyError(
                "a first format needs the run-time channel, which this proxy does not offer",
                code="birth-foreign-proxy",
                hint="make the first boot through svsm proxy; later boots work through COCONUT's aproxy too",
            )
        refusal = disk.try_open()
        if refusal is None:
            self._decided = True
            return Action.USE
        if self._state is VolumeState.NEW:
            if disk.has_magic() and not disk.announces_ours():
                raise PolicyError(
                    "the disk holds a volume that does not open with this new volume's key",
                    code="birth-somebodys-volume",
                    hint="it is somebody's volume: give the VM an empty disk, or wipe this one yourself",
                    reason=refusal.code,
                ) from refusal
            self._decided = True
            return Action.FORMAT
        if disk.has_magic():
            raise PolicyError(
                "the disk is not the volume that this key belongs to, or is damaged",
                code="birth-other-volume",
                hint="attach the disk that this VM was first booted with",
                reason=refusal.code,
            ) from refusal
        raise PolicyError(
            "the volume was used before, and the disk holds none",
            code="birth-no-volume",
            hint="attach the disk that this VM was first booted with; a used volume is never formatted again",
            reason=refusal.code,
        ) from refusal

    def formatted(self, *, counter: bytes, root: bytes) -> Formatted:
        """The report of the first durable state, to be sent once format and first TPM stores are flushed.

        A repetition (the first answer did not come) must name the same state.

        Raises:
            StateError: ``birth-order``.
        """
        message = Formatted(session=self._session, counter=counter, root=root)
        if not self._decided or not self.must_report or self._reported not in (None, message):
            raise StateError("a first format is reported out of order", code="birth-order")
        self._reported = message
        return message

    def acknowledge(self, answer: FormattedAcknowledged | Refused) -> None:
        """Take the broker's authenticated answer to `formatted`.

        Raises:
            PolicyError: ``birth-refused`` or ``birth-acknowledgement``: the kernel must stop.
            StateError: ``birth-order``.
        """
        if self._reported is None or self._acknowledged:
            raise StateError("an acknowledgement came out of order", code="birth-order")
        if isinstance(answer, Refused):
            raise PolicyError(
                "the broker does not accept this first format",
                code="birth-refused",
                hint="another instance of this VM attested later or reported first; only one may live",
                reason=answer.reason,
            )
        sent = self._reported
        same = (
            equal(answer.session, sent.session)
            and equal(answer.counter, sent.counter)
            and equal(answer.root, sent.root)
        )
        if not same:
            raise PolicyError("the broker acknowledges another state", code="birth-acknowledgement")
        self._acknowledged = True
