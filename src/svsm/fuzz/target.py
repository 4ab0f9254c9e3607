# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a fuzz target is, and what counts as a finding.

A target takes any bytes. It may return (accepted) or raise `SvsmError` (refused), in bounded time and memory. All
else is a finding: another exception, an invariant that `expect` found broken, more processor time than the target is
allowed, an error whose text cannot be printed. A finding has a *signature* (what, and where in our code), so that one
defect is reported once, and a minimised input still shows the same defect.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from svsm.formats.errors import SvsmError

__all__ = ["Broken", "Finding", "Outcome", "Target", "TimeLimit", "execute", "expect", "judge"]

_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MAX_MESSAGE = 4096


class Broken(Exception):
    """An invariant of the target does not hold."""


class TimeLimit(BaseException):
    """The watchdog's: no handler of the code under test may swallow it."""


class Finding(Exception):
    """A defect that an input brings out.

    Args:
        signature: Kind and place; the same defect has the same.
        text: For people: the traceback.
    """

    def __init__(self, signature: str, text: str) -> None:
        super().__init__(signature)
        self.signature = _shown(signature)
        self.text = _shown(text)


class Verdict(enum.Enum):
    """What the target said to an input."""

    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """An input that is no finding."""

    verdict: Verdict
    reason: str = ""
    """Of a refusal: error code and the line that raised it. The built-in engine keeps what shows a new one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One thing to fuzz.

    Attributes:
        name: On the command line, and of its folders.
        summary: One line.
        run: Takes any bytes.
        seeds: Inputs to start from, made by our own code.
        max_bytes: Longest input that makes sense.
        cpu_seconds: Processor time that one input may take.
    """

    name: str
    summary: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]] = list
    max_bytes: int = 4096
    cpu_seconds: float = 2.0


def expect(holds: bool, invariant: str) -> None:
    """State an invariant.

    Raises:
        Broken: When it does not hold.
    """
    if not holds:
        raise Broken(invariant)


def execute(target: Target, data: bytes) -> Outcome:
    """Run one input.

    Raises:
        Finding: See the module.
    """
    started = time.process_time()
    try:
        outcome = judge(target.run, data)
    except (Exception, TimeLimit) as error:
        if isinstance(error, Finding):
            raise
        raise Finding(_signature(error), "".join(traceback.format_exception(error))) from None
    spent = time.process_time() - started
    if spent > target.cpu_seconds:
        raise Finding("slow", f"{spent:.1f} s of processor time; allowed are {target.cpu_seconds:.1f} s\n")
    return outcome


def judge(action: Callable[..., object], *arguments: object) -> Outcome:
    """Run `action` with these arguments: a value or a proper `SvsmError`.

    Raises:
        Broken: For an error without a proper code, or whose text cannot be shown.
        Exception: Whatever else it raises.
    """
    try:
        action(*arguments)
    except SvsmError as error:
        shown = f"{error}"
        proper = type(error) is not SvsmError and _CODE.fullmatch(error.code) and len(shown) <= _MAX_MESSAGE
        expect(bool(proper), f"{type(error).__name__} [{error.code}] is no proper error")
        expect(_printable(shown) and _printable(error.hint or ""), f"[{error.code}] cannot be printed")
        return Outcome(Verdict.REFUSED, f"{error.code}@{_place(error.__traceback__)}")
    return Outcome(Verdict.ACCEPTED)


def _shown(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _printable(text: str) -> bool:
    try:
        return bool(text.encode("utf-8")) or not text
    except UnicodeEncodeError:
        return False


def _signature(error: BaseException) -> str:
    what = str(error) if isinstance(error, Broken) else type(error).__name__
    return f"{what} at {_place(error.__traceback__)}"


def _place(trace: TracebackType | None) -> str:
    """Module and line of the innermost frame in our code that is not this module's; of any code where there is none."""
    place = other = "?"
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name.startswith("svsm.") and name != __name__:
            place = f"{name}:{trace.tb_lineno}"
        elif name != __name__:
            other = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return other if place == "?" else place
