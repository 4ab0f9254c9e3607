# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume's first format: the rule, the acknowledgement, and a kill at every step (boot-protocol.md §4)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest

from svsm.formats.errors import (
    BackendError,
    FormatError,
    IntegrityError,
    PolicyError,
    ProtocolError,
    StateError,
    SvsmError,
)
from svsm.formats.negotiation import ChannelFrame
from svsm.formats.release_token import VolumeState
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged, Refused, parse_answer, parse_request
from svsm.kernel.attestation import Release
from svsm.kernel.runtime_channel import RuntimeChannel
from svsm.kernel.volume_birth import Action, Birth
from tests.key_support import Desk, Relay, run

SESSION = b"s" * 16
COUNTER = b"c" * 16
ROOT = b"r" * 32


@dataclasses.dataclass
class Disk:
    """A disk as the rules see it."""

    key: bytes | None = None
    """Of the volume that it holds."""
    magic: bool = False
    ours: bool = False
    looks: int = 0
    broken: bool = False

    def opener(self, key: bytes) -> Disk.Probe:
        return Disk.Probe(self, key)

    @dataclasses.dataclass
    class Probe:
        disk: Disk
        volume_key: bytes

        def try_open(self) -> SvsmError | None:
            self.disk.looks += 1
            if self.disk.broken:
                raise BackendError("I/O error", code="block-io")
            if self.disk.key is None:
                return FormatError("no volume", code="record-truncated")
            if self.disk.key != self.volume_key:
                return IntegrityError("does not authenticate", code="jwe-decrypt")
            return None

        def has_magic(self) -> bool:
            self.disk.looks += 1
            return self.disk.magic

        def announces_ours(self) -> bool:
            self.disk.looks += 1
            return self.disk.ours


def must_report(birth: Birth) -> bool:
    """Asked anew each time."""
    return birth.must_report


def decide(state: VolumeState, disk: Disk, *, can_report: bool = True) -> Action | str:
    try:
        return Birth(state=state, session=SESSION, can_report=can_report).decide(disk.opener(b"k"))
    except PolicyError as error:
        return error.code


@pytest.mark.parametrize(
    ("state", "disk", "can_report", "result"),
    [
        (VolumeState.NEW, Disk(key=b"k", magic=True), True, Action.USE),
        (VolumeState.NEW, Disk(key=b"other", magic=True), True, "birth-somebodys-volume"),
        (VolumeState.NEW, Disk(magic=True), True, "birth-somebodys-volume"),
        (VolumeState.NEW, Disk(magic=True, ours=True), True, Action.FORMAT),
        (VolumeState.NEW, Disk(magic=True, ours=True), False, "birth-foreign-proxy"),
        (VolumeState.NEW, Disk(), True, Action.FORMAT),
        (VolumeState.NEW, Disk(), False, "birth-foreign-proxy"),
        (VolumeState.NEW, Disk(key=b"k", magic=True), False, "birth-foreign-proxy"),
        (VolumeState.ACTIVE, Disk(key=b"k", magic=True), True, Action.USE),
        (VolumeState.ACTIVE, Disk(key=b"k", magic=True), False, Action.USE),
        (VolumeState.ACTIVE, Disk(key=b"other", magic=True), True, "birth-other-volume"),
        (VolumeState.ACTIVE, Disk(magic=True, ours=True), True, "birth-other-volume"),
        (VolumeState.ACTIVE, Disk(), True, "birth-no-volume"),
        (VolumeState.ACTIVE, Disk(), False, "birth-no-volume"),
    ],
)
def test_the_whole_rule(state: VolumeState, disk: Disk, can_report: bool, result: Action | str) -> None:
    assert decide(state, disk, can_report=can_report) == result


def test_a_foreign_proxy_is_refused_with_a_hint_before_the_disk_is_touched() -> None:
    disk = Disk()
    with pytest.raises(PolicyError) as caught:
        Birth(state=VolumeState.NEW, session=SESSION, can_report=False).decide(disk.opener(b"k"))
    assert "svsm proxy" in (caught.value.hint or "")
    assert disk.looks == 0


def test_a_disk_that_cannot_be_read_is_no_reason_to_format() -> None:
    birth = Birth(state=VolumeState.NEW, session=SESSION, can_report=True)
    with pytest.raises(BackendError):
        birth.decide(Disk(broken=True).opener(b"k"))
    with pytest.raises(StateError):
        birth.formatted(counter=COUNTER, root=ROOT)


def test_a_new_volume_must_be_reported_until_it_is_acknowledged() -> None:
    birth = Birth(state=VolumeState.NEW, session=SESSION, can_report=True)
    assert must_report(birth)
    birth.decide(Disk().opener(b"k"))
    assert must_report(birth)
    message = birth.formatted(counter=COUNTER, root=ROOT)
    assert must_report(birth)
    birth.acknowledge(FormattedAcknowledged(reply_to=0, session=SESSION, counter=COUNTER, root=ROOT))
    assert not must_report(birth)
    assert message == Formatted(session=SESSION, counter=COUNTER, root=ROOT)
    assert not must_report(Birth(state=VolumeState.ACTIVE, session=SESSION, can_report=False))


@pytest.mark.parametrize(
    ("session", "counter", "root"),
    [(b"t" * 16, COUNTER, ROOT), (SESSION, b"d" * 16, ROOT), (SESSION, COUNTER, b"q" * 32), (SESSION, COUNTER, b"r")],
)
def test_an_acknowledgement_of_something_else(session: bytes, counter: bytes, root: bytes) -> None:
    birth = Birth(state=VolumeState.NEW, session=SESSION, can_report=True)
    birth.decide(Disk().opener(b"k"))
    birth.formatted(counter=COUNTER, root=ROOT)
    with pytest.raises(PolicyError) as caught:
        birth.acknowledge(FormattedAcknowledged(reply_to=0, session=session, counter=counter, root=root))
    assert caught.value.code == "birth-acknowledgement"
    assert birth.must_report


def test_order_of_reports() -> None:
    birth = Birth(state=VolumeState.NEW, session=SESSION, can_report=True)
    acknowledged = FormattedAcknowledged(reply_to=0, session=SESSION, counter=COUNTER, root=ROOT)
    with pytest.raises(StateError):
        birth.acknowledge(acknowledged)
    birth.decide(Disk().opener(b"k"))
    birth.formatted(counter=COUNTER, root=ROOT)
    assert birth.formatted(counter=COUNTER, root=ROOT).root == ROOT
    with pytest.raises(StateError):
        birth.formatted(counter=COUNTER, root=b"other")
    birth.acknowledge(acknowledged)
    with pytest.raises(StateError):
        birth.acknowledge(acknowledged)
    with pytest.raises(StateError):
        birth.formatted(counter=COUNTER, root=ROOT)


# --- with a broker -----------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "broker")


def channel_of(release: Release) -> RuntimeChannel:
    assert release.runtime is not None
    return release.runtime


def report(release: Release, relay: Relay, *, counter: bytes = COUNTER, root: bytes = ROOT) -> object:
    _, body = channel_of(release).request(Formatted(session=release.session, counter=counter, root=root))
    return channel_of(release).answer(relay.channel(body))


def test_new_becomes_active_and_the_same_report_may_come_again(desk: Desk) -> None:
    release, relay = desk.attest()
    first = report(release, relay)
    assert first == FormattedAcknowledged(reply_to=0, session=release.session, counter=COUNTER, root=ROOT)
    row = desk.broker.volume(desk.configuration.volume_id)
    assert row.state is VolumeState.ACTIVE
    assert row.birth is not None
    assert (row.birth.counter, row.birth.root) == (COUNTER, ROOT)
    again = report(release, relay)
    assert again == FormattedAcknowledged(reply_to=1, session=release.session, counter=COUNTER, root=ROOT)
    for counter, root in ((b"d" * 16, ROOT), (COUNTER, b"q" * 32)):
        other = report(release, relay, counter=counter, root=root)
        assert isinstance(other, Refused)
        assert other.reason == "broker-already-active"
    assert desk.attest()[0].state is VolumeState.ACTIVE


def test_two_instances_with_new_tokens_one_lives(desk: Desk) -> None:
    one, relay_one = desk.attest()
    two, relay_two = desk.attest()
    assert one.state is two.state is VolumeState.NEW
    early = report(one, relay_one)
    assert isinstance(early, Refused)
    assert early.reason == "broker-not-last-attested"
    assert isinstance(report(two, relay_two), FormattedAcknowledged)
    # even the very same state from the other session is refused
    late = report(one, relay_one)
    assert isinstance(late, Refused)
    assert late.reason == "broker-already-active"
    birth = Birth(state=one.state, session=one.session, can_report=True)
    birth.decide(Disk().opener(b"k"))
    birth.formatted(counter=COUNTER, root=ROOT)
    with pytest.raises(PolicyError) as stopped:
        birth.acknowledge(late)
    assert stopped.value.code == "birth-refused"


def test_two_instances_the_other_way_round(desk: Desk) -> None:
    one, relay_one = desk.attest()
    assert isinstance(report(one, relay_one), FormattedAcknowledged)
    two, relay_two = desk.attest()
    assert two.state is VolumeState.ACTIVE
    refused = report(two, relay_two, root=b"q" * 32)
    assert isinstance(refused, Refused)
    # the first keeps being acknowledged: its answer may have been lost
    assert isinstance(report(one, relay_one), FormattedAcknowledged)


def test_forged_acknowledgements(desk: Desk) -> None:
    release, relay = desk.attest()
    _, body = channel_of(release).request(Formatted(session=release.session, counter=COUNTER, root=ROOT))
    genuine = ChannelFrame.parse(relay.channel(body)).sealed
    plain = FormattedAcknowledged(reply_to=0, session=release.session, counter=COUNTER, root=ROOT).pack()
    flipped = genuine[:-1] + bytes([genuine[-1] ^ 1])
    for forged in (b"", plain, bytes(8) + plain, flipped, genuine[:-1], ChannelFrame.parse(body).sealed):
        with pytest.raises(IntegrityError) as caught:
            channel_of(release).answer(ChannelFrame(sealed=forged).pack())
        assert caught.value.code == "channel-forged"
    assert isinstance(channel_of(release).answer(ChannelFrame(sealed=genuine).pack()), FormattedAcknowledged)


def test_replayed_and_withheld_acknowledgements(desk: Desk) -> None:
    release, relay = desk.attest()
    channel = channel_of(release)
    message = Formatted(session=release.session, counter=COUNTER, root=ROOT)
    _, first = channel.request(message)
    kept = relay.channel(first)
    _, second = channel.request(message)
    answer = relay.channel(second)
    late = channel.answer(kept)
    assert late.reply_to == 0  # recognisable: it does not answer the second request
    assert channel.answer(answer).reply_to == 1
    with pytest.raises(IntegrityError) as caught:
        channel.answer(answer)
    assert caught.value.code == "channel-replayed"


def test_an_acknowledgement_from_another_session(desk: Desk) -> None:
    one, relay_one = desk.attest()
    _, body = channel_of(one).request(Formatted(session=one.session, counter=COUNTER, root=ROOT))
    answer = relay_one.channel(body)
    two, _ = desk.attest()
    with pytest.raises(IntegrityError) as caught:
        channel_of(two).answer(answer)
    assert caught.value.code == "channel-forged"


def test_a_request_replayed_to_the_broker_or_under_another_cookie(desk: Desk) -> None:
    one, relay_one = desk.attest()
    _, body = channel_of(one).request(Formatted(session=one.session, counter=COUNTER, root=ROOT))
    relay_one.channel(body)
    with pytest.raises(AssertionError, match="broker-channel-refused"):
        relay_one.channel(body)
    _, relay_two = desk.attest()
    _, next_body = channel_of(one).request(Formatted(session=one.session, counter=COUNTER, root=ROOT))
    with pytest.raises(AssertionError, match="broker-channel-refused"):
        relay_two.channel(next_body)


def test_a_message_that_names_another_session_than_its_channel(desk: Desk) -> None:
    one, _ = desk.attest()
    two, relay_two = desk.attest()
    _, body = channel_of(two).request(Formatted(session=one.session, counter=COUNTER, root=ROOT))
    answer = channel_of(two).answer(relay_two.channel(body))
    assert isinstance(answer, Refused)
    assert answer.reason == "broker-other-session"
    assert desk.broker.volume(desk.configuration.volume_id).state is VolumeState.NEW


def test_an_answer_that_was_not_asked_for(desk: Desk) -> None:
    from svsm.crypto.secure_channel import ChannelKeys, Sealer

    keys = ChannelKeys(to_broker=b"b" * 32, to_kernel=b"k" * 32)
    channel = RuntimeChannel(keys)
    _, sealed = Sealer(keys.to_kernel).seal(Refused(reply_to=0, reason="x").pack())
    with pytest.raises(ProtocolError) as caught:
        channel.answer(ChannelFrame(sealed=sealed).pack())
    assert caught.value.code == "channel-unasked"


def test_hostile_plaintexts() -> None:
    for text in (b"", b"{}", b'{"type":"open"}', b'{"type":"formatted"}', b'{"type":"refused","reply_to":0}'):
        with pytest.raises(SvsmError):
            parse_request(text)
        with pytest.raises(SvsmError):
            parse_answer(text)
    good = Formatted(session=SESSION, counter=COUNTER, root=ROOT)
    assert parse_request(good.pack()) == good
    for bad in (
        dataclasses.replace(good, session=b""),
        dataclasses.replace(good, counter=b"c" * 15),
        dataclasses.replace(good, root=b""),
        dataclasses.replace(good, root=b"r" * 65),
    ):
        with pytest.raises(FormatError):
            bad.pack()


STEPS = ("attested", "decided", "formatted", "sent", "recorded", "acknowledged")


class Killed(Exception):
    pass


def boot(desk: Desk, disk: Disk, *, die_after: str | None) -> tuple[Action, list[str]]:
    """One boot; returns what was done with the disk and what left the kernel."""

    def step(name: str) -> None:
        if name == die_after:
            raise Killed

    left: list[str] = []
    relay = desk.relay()
    release = run(desk.client(), desk.chip(), relay)
    step("attested")
    birth = Birth(state=release.state, session=release.session, can_report=release.runtime is not None)
    action = birth.decide(disk.opener(release.volume_key))
    step("decided")
    if action is Action.FORMAT:
        assert disk.key is None
        disk.key, disk.magic = release.volume_key, True
    step("formatted")
    if birth.must_report:
        message = birth.formatted(counter=COUNTER, root=ROOT)
        _, body = channel_of(release).request(message)
        step("sent")
        answer = relay.channel(body)
        step("recorded")
        birth.acknowledge(channel_of(release).answer(answer))
    step("acknowledged")
    assert not birth.must_report
    left.append("TPM answer")
    return action, left


@pytest.mark.parametrize("kills", [*[(step,) for step in STEPS], *itertools.product(STEPS[:4], STEPS[2:5])])
def test_a_kill_at_every_step_of_a_first_boot(tmp_path: Path, kills: tuple[str, ...]) -> None:
    desk, disk = Desk(tmp_path / "broker"), Disk()
    for kill in kills:
        with contextlib.suppress(Killed):
            boot(desk, disk, die_after=kill)
        desk.broker.close()
        desk.broker = desk.open()
    formatted_before = disk.key is not None
    action, left = boot(desk, disk, die_after=None)
    assert left == ["TPM answer"]
    assert action is (Action.USE if formatted_before else Action.FORMAT)
    assert desk.broker.volume(desk.configuration.volume_id).state is VolumeState.ACTIVE
    assert boot(desk, disk, die_after=None)[0] is Action.USE
    with pytest.raises(PolicyError) as caught:
        boot(desk, Disk(), die_after=None)
    assert caught.value.code == "birth-no-volume"
