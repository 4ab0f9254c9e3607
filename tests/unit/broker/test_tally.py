# SPDX-License-Identifier: MIT OR Apache-2.0
"""What strangers repeat is counted: few lines, and not one decision less."""

from __future__ import annotations

import contextlib
import datetime
import os
import sqlite3
from pathlib import Path

import pytest

from svsm.broker.app import BrokerApp
from svsm.broker.audit import AuditLine, verify_chain
from svsm.broker.http import Request
from svsm.broker.store import Store
from svsm.broker.tally import Kind, Tally, TallyLimits
from svsm.crypto.digests import sha512
from svsm.crypto.ephemeral import EphemeralKey
from svsm.formats import kbs
from svsm.formats.errors import BackendError, SvsmError
from tests.key_support import START, Chip, Clock, Desk, configuration, simulated_root

SESSION = b"s" * 16


class Books:
    """A tally over a database of its own, with clocks that the test moves together."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.clock = Clock()
        self.store = Store(folder / "broker.sqlite", now=self.now)
        self.tally = Tally(self.store, now=self.now, clock=self.clock, limits=TallyLimits(**limits))  # type: ignore[arg-type]

    def now(self) -> datetime.datetime:
        return START + datetime.timedelta(seconds=self.clock.seconds)

    def garbage(self, reason: str = "json-syntax") -> None:
        self.tally.unsigned("attest", reason, session=SESSION, claimed=None, details={"detail": "x"})

    def replay(self, volume_id: str = "v", reason: str = "report-data") -> None:
        self.tally.signed(Kind("attest", reason, volume_id), session=SESSION, details={"detail": "x"})

    def lines(self) -> list[AuditLine]:
        lines = self.store.audit_lines()
        verify_chain(lines)
        return lines


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


def decisions(lines: list[AuditLine], reason: str | None, event: str = "attest") -> int:
    return sum(line.decisions for line in lines if (line.event, line.reason) == (event, reason))


def test_the_first_has_its_line_at_once_and_the_rest_one_a_minute(books: Books) -> None:
    first = books.now()
    for _ in range(500):
        books.garbage()
    assert [(line.reason, line.session, line.decisions) for line in books.lines()] == [
        ("json-syntax", SESSION.hex(), 1)
    ]
    books.clock.seconds += 59.9
    books.tally.flush()
    assert len(books.lines()) == 1
    books.clock.seconds += 0.1
    books.tally.flush()
    books.tally.flush()
    line = books.lines()[1]
    assert (line.event, line.decision, line.reason, line.session) == ("attest", "refused", "json-syntax", None)
    assert line.details == {"count": "499", "since": first.isoformat(timespec="milliseconds")}
    # the line that counted begins a minute too
    books.garbage()
    assert len(books.lines()) == 2
    books.clock.seconds += 60
    books.tally.flush()
    books.clock.seconds += 60
    books.garbage()
    lines = books.lines()
    assert [line.decisions for line in lines] == [1, 499, 1, 1]
    assert decisions(lines, "json-syntax") == 502


def test_an_hour_of_garbage_is_a_line_a_minute(books: Books) -> None:
    for _ in range(3600):
        books.clock.seconds += 1
        books.garbage()
    books.tally.flush(everything=True)
    lines = books.lines()
    assert len(lines) <= 62
    assert decisions(lines, "json-syntax") == 3600


def test_reasons_are_counted_apart_and_their_number_is_bounded(tmp_path: Path) -> None:
    books = Books(tmp_path, reasons=3)
    for number in range(10):
        for _ in range(5):
            books.garbage(f"reason-{number}")
    assert len(books.lines()) == 4
    books.tally.flush(everything=True)
    lines = books.lines()
    assert len(lines) == 8
    assert [decisions(lines, reason) for reason in ("reason-0", "reason-1", "reason-2", "other")] == [5, 5, 5, 35]
    assert [line.details["code"] for line in lines if "code" in line.details] == ["reason-3"]
    # what has been quiet for its minute makes room
    books.clock.seconds += 61
    books.tally.flush()
    books.garbage("reason-9")
    assert decisions(books.lines(), "reason-9") == 1


def test_genuine_evidence_has_an_allowance_for_each_volume(tmp_path: Path) -> None:
    books = Books(tmp_path, lines_per_volume=3)
    for volume in ("v", "w"):
        for _ in range(10):
            books.replay(volume)
    assert [line.volume_id for line in books.lines()] == ["v"] * 3 + ["w"] * 3
    books.clock.seconds += 60
    books.tally.flush()
    lines = books.lines()
    assert [(line.volume_id, line.decisions, line.session) for line in lines[6:]] == [("v", 7, None), ("w", 7, None)]
    books.replay("v", "report-measurement")
    books.replay("v", "report-measurement")
    assert [line.decisions for line in books.lines()[8:]] == [1]
    books.tally.flush(everything=True)
    assert decisions(books.lines(), "report-measurement") == 2
    # forged channel messages do not use up what evidence has
    for _ in range(5):
        books.tally.signed(Kind("channel", "channel-open", "w"), session=SESSION, details={})
    books.replay("w")
    assert books.lines()[-1].reason == "report-data"


def test_an_hour_of_a_replayed_report_is_two_lines_a_minute(books: Books) -> None:
    for _ in range(1800):
        books.clock.seconds += 2
        books.replay()
    books.tally.flush(everything=True)
    lines = books.lines()
    assert len(lines) <= 8 + 2 * 61
    assert decisions(lines, "report-data") == 1800


def test_nothing_of_what_is_over_is_kept(books: Books) -> None:
    for number in range(20):
        books.replay(f"volume-{number}")
    books.garbage()
    books.clock.seconds += 600
    books.tally.flush()
    assert not books.tally._counts
    assert not books.tally._allowances


@pytest.mark.parametrize("kind", ["garbage", "replay"])
def test_counts_survive_a_database_that_fails(books: Books, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = getattr(books, kind)

    def full(*_: object, **__: object) -> None:
        raise BackendError("the disk is full", code="broker-database")

    with monkeypatch.context() as failing:
        failing.setattr(books.store, "record", full)
        with pytest.raises(BackendError):
            attempt()
        books.clock.seconds += 100
        with contextlib.suppress(BackendError):
            attempt()
        books.clock.seconds += 100
        with pytest.raises(BackendError):
            books.tally.flush()
        with contextlib.suppress(BackendError):
            attempt()
        with pytest.raises(BackendError):
            books.tally.flush(everything=True)
    assert not books.lines()
    books.clock.seconds += 100
    books.tally.flush()
    assert sum(line.decisions for line in books.lines()) == 3


# --- the broker ------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "broker")


def reopened(desk: Desk) -> list[AuditLine]:
    """The trail after an orderly end."""
    desk.broker.close()
    desk.broker = desk.open()
    return desk.broker.audit_trail()


def test_a_flood_neither_closes_the_broker_nor_fills_its_disk(desk: Desk) -> None:
    """4096 challenges once kept everybody out for a minute, and each garbage body was 300 bytes for ever."""
    for _ in range(3000):
        session, _ = desk.broker.challenge()
        with pytest.raises(SvsmError):
            desk.broker.attest(session, b"{}")
    for _ in range(5000):
        desk.broker.challenge()
    size = os.path.getsize(desk.folder / "broker.sqlite")
    assert len(desk.attest()[0].volume_key) == 32
    lines = reopened(desk)
    assert len(lines) == 6  # create, allow, first refusal, attest, release, count
    assert sum(line.decisions for line in lines if line.reason) == 3000
    assert os.path.getsize(desk.folder / "broker.sqlite") <= size + 4096


def test_sessions_that_nobody_gave_are_counted(desk: Desk) -> None:
    for number in range(100):
        with pytest.raises(SvsmError):
            desk.broker.attest(number.to_bytes(16, "big"), b"{}")
    assert len(desk.broker.audit_trail()) == 3
    assert decisions(reopened(desk), "broker-session-unknown") == 100


def test_counts_are_written_when_their_minute_is_over(desk: Desk) -> None:
    for _ in range(7):
        with pytest.raises(SvsmError):
            desk.broker.attest(bytes(16), b"{}")
    desk.broker.flush_audit()
    assert len(desk.broker.audit_trail()) == 3
    desk.clock.seconds += 60
    desk.broker.flush_audit()
    assert desk.broker.audit_trail()[-1].details["count"] == "6"


def test_a_replayed_genuine_report_is_limited_by_volume(desk: Desk) -> None:
    """Anybody who once saw a report of a volume's machine can send it again, under each new challenge."""
    key = EphemeralKey.generate()
    other = configuration("other")
    desk.broker.create_volume(other, root=simulated_root(0), allowed=[])
    recorded = desk.chip().report(sha512(key.x, key.y, b"c" * 32))
    unlisted = Chip(host_data=other.host_data()).report(sha512(key.x, key.y, b"c" * 32))

    def send(evidence_report: bytes, certificates: bytes | None) -> str | None:
        relay = desk.relay()
        nonce = kbs.AuthAnswer.parse(relay.request("POST", kbs.AUTH_PATH, kbs.AuthRequest().pack()).body).nonce
        body = kbs.AttestRequest(
            nonce=nonce, key_x=key.x, key_y=key.y, report=evidence_report, certificates=certificates
        ).pack()
        return kbs.ErrorBody.code_of(relay.request("POST", kbs.ATTEST_PATH, body).body)

    before = len(desk.broker.audit_trail())
    for _ in range(100):
        assert send(recorded.report, recorded.certificates) == "broker-evidence-refused"
    assert len(desk.broker.audit_trail()) - before == 8
    send(unlisted.report, unlisted.certificates)
    line = desk.broker.audit_trail()[-1]
    assert line.volume_id == other.volume_id
    assert line.details["authentic"] == "yes"
    lines = reopened(desk)
    assert decisions([line for line in lines if line.volume_id == desk.volume.volume_id], "report-data") == 100
    # a changed byte makes it nobody's: counted apart, without the volume's allowance
    changed = bytearray(recorded.report)
    changed[0x90] ^= 1
    for _ in range(20):
        send(bytes(changed), recorded.certificates)
    added = desk.broker.audit_trail()[len(lines) :]
    assert [line.details["authentic"] for line in added] == ["no"]


def test_a_release_has_one_line_for_each_session(desk: Desk) -> None:
    _, first = desk.attest()
    _, second = desk.attest()
    for relay in (first, second):
        for _ in range(50):
            assert relay.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").status == 200
    lines = [line for line in desk.broker.audit_trail() if line.event == "release"]
    assert len(lines) == len({line.session for line in lines}) == 2
    lines = [line for line in reopened(desk) if line.event == "release"]
    assert [(line.decision, line.decisions) for line in lines] == [("granted", 1), ("granted", 1), ("granted", 100)]
    assert lines[-1].volume_id == desk.volume.volume_id


def test_a_release_that_cannot_be_recorded_is_not_made(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    session: list[bytes] = []
    real = desk.broker._store.record

    def record(event: str, **facts: object) -> None:
        if event == "release" and not session:
            session.append(facts["session"])  # type: ignore[arg-type]
            raise BackendError("the disk is full", code="broker-database")
        real(event, **facts)  # type: ignore[arg-type]

    monkeypatch.setattr(desk.broker._store, "record", record)
    with pytest.raises(SvsmError):
        desk.attest()
    assert "release" not in [line.event for line in desk.broker.audit_trail()]
    assert desk.broker.resource(session[0])
    assert [line.event for line in desk.broker.audit_trail()][-1] == "release"


def test_forged_channel_messages_are_limited(desk: Desk) -> None:
    release, _ = desk.attest()
    before = len(desk.broker.audit_trail())
    for _ in range(100):
        with pytest.raises(SvsmError):
            desk.broker.channel(release.session, b"x" * 64)
    assert len(desk.broker.audit_trail()) - before == 8
    lines = reopened(desk)
    assert sum(line.decisions for line in lines if line.event == "channel") == 100


def test_one_volumes_releases_take_no_other_volumes_place(desk: Desk) -> None:
    other = configuration("other")
    desk.broker.create_volume(other, root=simulated_root(0), allowed=[b"L" * 48])
    first, kept = desk.attest()
    own, desk.configuration = desk.configuration, other
    desk.broker.allow(other.volume_id, Chip(host_data=b"").measurement)
    relays = [desk.attest()[1] for _ in range(20)]
    statuses = [relay.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").status for relay in relays]
    assert statuses == [401] * 4 + [200] * 16
    assert kept.request("GET", kbs.DEFAULT_RESOURCE_PATH, b"").status == 200
    desk.configuration = own
    again = relays[0].request("POST", kbs.ATTEST_PATH, b"{}")
    assert kbs.ErrorBody.code_of(again.body) == "broker-challenge-used"
    assert first.volume_key


def test_counted_lines_cannot_be_changed(desk: Desk) -> None:
    app = BrokerApp(desk.broker)
    cookie = f"kbs-session-id={'0' * 32}"
    for _ in range(5):
        assert app(Request("POST", kbs.ATTEST_PATH, cookie, b"{}")).status == 401
    reopened(desk)
    with contextlib.closing(sqlite3.connect(desk.folder / "broker.sqlite")) as connection, connection:
        connection.execute("UPDATE audit SET details = replace(details, '\"4\"', '\"1\"')")
    with pytest.raises(SvsmError) as caught:
        desk.broker.audit_trail()
    assert caught.value.code == "broker-audit-chain"
