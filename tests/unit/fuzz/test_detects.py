# SPDX-License-Identifier: MIT OR Apache-2.0
"""A check taken out of the code is found by the target that is there for it, with the simple engine and its seeds."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from svsm.abi.platform import Gpa, Permission
from svsm.crypto import secure_channel, token
from svsm.crypto.guest_channel import open_message
from svsm.formats.errors import SvsmError
from svsm.formats.frames import FrameDecoder, FrameHeader
from svsm.fuzz.builtin import fuzz
from svsm.fuzz.targets import find
from svsm.kernel import attestation, guest_requests, machine_port, processes
from svsm.kernel.protocols import core, guest_memory
from svsm.storage.cocoonfs import expected, image, provisioning, replay, tree, volume
from svsm.storage.drivers import remote

_kept: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _cleanup() -> Iterator[None]:
    yield
    while _kept:
        _kept.pop().close()


def _anything_goes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guest_memory.GuestMemory, "contains", lambda _self, _gpa, length: length > 0)


def _vmsas_are_ordinary_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guest_memory.GuestMemory, "_taken", lambda _self, _gpa, _length: False)


def _pages_are_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    def validate(self: core._Core, gpa: Gpa, size: int, *, ignore_unchanged: bool) -> bool:
        changed = self._platform.validate(gpa, size_bytes=size, validated=True)
        self._platform.adjust(gpa, size_bytes=size, vmpl=core.GUEST_VMPL, permissions=Permission.ALL, vmsa=False)
        return changed

    patch.setattr(core._Core, "_validate", validate)


def _no_frame_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FrameDecoder, "_announced", lambda self: FrameHeader.parse_at(self._buffer, 0).body_bytes)


def _no_signature(patch: pytest.MonkeyPatch) -> None:
    class Key:
        def verify(self, *_arguments: object) -> None:
            """Everything is signed."""

    patch.setattr(token, "_load_public", lambda _der: Key())


def _no_replay_check(patch: pytest.MonkeyPatch) -> None:
    genuine = secure_channel.Opener.open

    def opened(self: secure_channel.Opener, sealed: bytes) -> tuple[int, bytes]:
        self._last = -1
        return genuine(self, sealed)

    patch.setattr(secure_channel.Opener, "open", opened)


def _tokens_for_anybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attestation, "equal", lambda _left, _right: True)


def _a_stale_report(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        guest_requests.GuestRequestChannel,
        "_open",
        lambda self, response: open_message(bytes(self._key), response)[1],
    )


def _descriptors_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine_port, "_close", lambda _descriptors: None)


def _clients_stay(patch: pytest.MonkeyPatch) -> None:
    genuine = processes.Process.end

    def end(self: processes.Process, reason: SvsmError | None = None) -> None:
        _kept.extend(client for _, client in self._outgoing if client is not None)
        self._outgoing.clear()
        genuine(self, reason)

    patch.setattr(processes.Process, "end", end)


def _no_tree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tree.AuthTree, "check", lambda *_arguments: None)


def _no_authentication(patch: pytest.MonkeyPatch) -> None:
    _no_tree(patch)
    patch.setattr(tree.AuthTree, "load_root", lambda *_arguments: None)
    patch.setattr(image, "equal", lambda _left, _right: True)


def _a_plan_that_writes_first(patch: pytest.MonkeyPatch) -> None:
    genuine = replay.plan_replay

    def plan(context: image.VolumeContext, head: bytes) -> object:
        context.io.zero_first(context.places.journal_head[0])
        return genuine(context, head)

    patch.setattr(volume, "plan_replay", plan)


def _anything_is_expected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(expected.Expected, "check_creation", lambda *_arguments: None)


def _announcements_stay_as_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(provisioning._Copies, "put", lambda *_arguments, backup: None)


def _any_sequence(patch: pytest.MonkeyPatch) -> None:
    def describe(self: remote.RemoteDevice) -> tuple[int, int]:
        deadline = self._deadline()
        reply = self._header(remote.INFO, self._send(remote.INFO, 0, 0, b"", deadline), deadline)
        return reply.length, reply.offset

    patch.setattr(remote.RemoteDevice, "_describe", describe)


_CASES = [
    ("guest-calls", _anything_goes, 5000),
    ("guest-calls", _vmsas_are_ordinary_pages, 20000),
    pytest.param("guest-calls", _pages_are_not_zeroed, 20000, marks=pytest.mark.long),
    ("frames", _no_frame_limit, 5000),
    ("token", _no_signature, 3000),
    ("runtime-channel", _no_replay_check, 3000),
    ("attestation-client", _tokens_for_anybody, 5000),
    ("guest-requests", _a_stale_report, 5000),
    ("host-port", _descriptors_stay, 3000),
    pytest.param("hijacked-service", _clients_stay, 10000, marks=pytest.mark.long),
    ("cocoonfs-open", _no_tree, 5000),
    pytest.param("cocoonfs-open", _no_authentication, 5000, marks=pytest.mark.long),
    ("cocoonfs-announced", _anything_is_expected, 2000),
    ("cocoonfs-bytes", _announcements_stay_as_they_are, 2000),
    ("cocoonfs-journal", _a_plan_that_writes_first, 5000),
    ("block-remote", _any_sequence, 5000),
]


@pytest.mark.parametrize(("name", "remove", "executions"), _CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_removed_check_is_found(
    name: str, remove: Callable[[pytest.MonkeyPatch], None], executions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = find(name)
    seeds = target.seeds()
    assert not fuzz(target, seeds, seed=1, executions=50).findings
    remove(monkeypatch)
    done = 0
    while done < executions:
        run = fuzz(target, seeds, seed=done, executions=500)
        done += 500
        if run.findings:
            return
    pytest.fail(f"{name} did not notice in {executions} executions")
