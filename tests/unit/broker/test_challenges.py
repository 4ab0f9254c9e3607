# SPDX-License-Identifier: MIT OR Apache-2.0
"""Challenges that store nothing: given without end, spent once, never forgotten before they expire."""

from __future__ import annotations

import contextlib
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.broker.challenges import Challenges
from svsm.formats.errors import PolicyError, ProtocolError, SvsmError

PIECE = 4096


def code_of(challenges: Challenges, session: bytes, now: float) -> str | None:
    """How spending ends: None when it is accepted."""
    try:
        challenges.spend(session, now)
    except SvsmError as error:
        return error.code
    return None


def test_a_challenge_belongs_to_its_session_and_works_once() -> None:
    challenges = Challenges(seconds=60, room=PIECE)
    given_out = [challenges.issue(0.5 * number) for number in range(50)]
    assert len({session for session, _ in given_out}) == len({challenge for _, challenge in given_out}) == 50
    assert {(len(session), len(challenge)) for session, challenge in given_out} == {(16, 32)}
    for session, challenge in reversed(given_out):
        assert challenges.spend(session, 30.0) == challenge
    for session, _ in given_out:
        assert code_of(challenges, session, 30.0) == "broker-challenge-used"


def test_a_challenge_expires_after_its_time_spent_or_not() -> None:
    challenges = Challenges(seconds=60, room=PIECE)
    early, late = challenges.issue(1000.0)[0], challenges.issue(1000.0)[0]
    assert challenges.live(early, 1059.9)
    assert code_of(challenges, early, 1059.9) is None
    assert code_of(challenges, early, 1059.95) == "broker-challenge-used"
    for session in (early, late):
        assert not challenges.live(session, 1060.0)
        assert code_of(challenges, session, 1060.0) == "broker-session-unknown"


@given(st.binary(max_size=40))
def test_made_up_sessions_are_unknown(session: bytes) -> None:
    challenges = Challenges(seconds=60, room=PIECE)
    challenges.issue(0.0)
    assert code_of(challenges, session, 1.0) == "broker-session-unknown"


def test_another_process_and_every_changed_bit_are_unknown() -> None:
    challenges, other = Challenges(seconds=60, room=PIECE), Challenges(seconds=60, room=PIECE)
    session, challenge = challenges.issue(0.0)
    other.issue(0.0)
    assert code_of(other, session, 1.0) == "broker-session-unknown"
    for bit in range(128):
        changed = (int.from_bytes(session, "big") ^ 1 << bit).to_bytes(16, "big")
        assert code_of(challenges, changed, 1.0) == "broker-session-unknown"
    assert challenges.spend(session, 1.0) == challenge


def test_giving_challenges_takes_no_memory() -> None:
    challenges = Challenges(seconds=60, room=1 << 24)
    challenges.issue(0.0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20_000):
            challenges.issue(1.0)
        # One session in a table, as before, took some 300 bytes.
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


def test_answering_takes_a_bit_each_until_they_expire() -> None:
    challenges = Challenges(seconds=60, room=1 << 24)
    sessions = [challenges.issue(0.0)[0] for _ in range(3 * PIECE)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for session in sessions:
            challenges.spend(session, 1.0)
        assert tracemalloc.get_traced_memory()[0] - before < 3 * PIECE // 8 + 4096
    finally:
        tracemalloc.stop()
    assert {code_of(challenges, session, 59.0) for session in sessions} == {"broker-challenge-used"}
    assert len(challenges._pieces) == 3
    challenges.spend(challenges.issue(61.0)[0], 61.0)
    assert len(challenges._pieces) == 1


def test_where_memory_is_full_a_spent_challenge_stays_spent() -> None:
    """Refusing is the only way out: making room would make an answered challenge good again."""
    challenges = Challenges(seconds=60, room=PIECE)
    first, second = challenges.issue(0.0)[0], challenges.issue(0.0)[0]
    for _ in range(PIECE - 2):
        challenges.issue(0.0)
    beyond = challenges.issue(0.0)[0]
    challenges.spend(first, 1.0)
    with pytest.raises(PolicyError) as busy:
        challenges.spend(beyond, 1.0)
    assert busy.value.code == "broker-busy"
    assert code_of(challenges, first, 1.0) == "broker-challenge-used"
    assert code_of(challenges, second, 1.0) is None
    later = challenges.issue(30.0)[0]
    assert code_of(challenges, later, 59.0) == "broker-busy"
    assert code_of(challenges, later, 60.0) is None
    assert code_of(challenges, first, 60.0) == "broker-session-unknown"


def test_a_piece_is_kept_for_its_youngest_session() -> None:
    challenges = Challenges(seconds=60, room=2 * PIECE)
    old = challenges.issue(0.0)[0]
    young = challenges.issue(50.0)[0]
    challenges.spend(young, 50.0)
    challenges.spend(old, 51.0)
    for _ in range(PIECE):
        challenges.issue(100.0)
    challenges.spend(challenges.issue(100.0)[0], 100.0)
    assert code_of(challenges, young, 100.0) == "broker-challenge-used"


def test_many_threads_spend_one_challenge_once() -> None:
    challenges = Challenges(seconds=60, room=PIECE)
    for _ in range(20):
        session = challenges.issue(0.0)[0]
        spent: list[bytes] = []
        start = threading.Barrier(6)

        def attempt(session: bytes = session, spent: list[bytes] = spent, start: threading.Barrier = start) -> None:
            start.wait()
            with contextlib.suppress(ProtocolError):
                spent.append(challenges.spend(session, 1.0))

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(spent) == 1
