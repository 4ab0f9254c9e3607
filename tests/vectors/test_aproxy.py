# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our proxy in the place of COCONUT's, on 104 recorded exchanges of it (../shared/vectors/aproxy).

Each recording is played again: its kernel's bytes on a real socket, its broker's answers from a real HTTP server.
What ours says to both is compared with what COCONUT's said. `_DIFFERENT` lists every scenario where it should not be
the same, with what ours does instead; a scenario that is in no list must be equal on both wires.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svsm.host.proxy.relay import Limits
from svsm.host.proxy.server import serve
from tests.support import vectors

_FAILURE = '{"success":false,"decryption":null,"token":null}'

# Where COCONUT's process ends without a frame although the kernel waits for one: ours answers the failure frame.
_ANSWERS_FAILURE = {
    "attest-malformed-json", "attest-no-token", "attestation-certs-null", "attestation-evidence-unknown",
    "attestation-no-key", "attestation-report-unpadded", "attestation-report-urlsafe", "jwe-duplicate-alg",
    "jwe-epk-padded", "jwe-epk-unprotected", "jwe-no-epk", "jwe-protected-padded", "kbs-hangs", "resource-compact-jwe",
    "resource-malformed-json", "resource-missing-tag", "resource-plain-secret", "tee-changes",
}  # fmt: skip
# The header is forwarded as received, where COCONUT's writes it again and so breaks what the kernel authenticates.
_KEEPS_HEADER = {
    "jwe-enc-before-alg", "jwe-epk-first", "jwe-epk-kty-first", "jwe-escapes", "jwe-extra-first",
    "jwe-extra-unsorted", "jwe-whitespace", "jwe-duplicate-extra", "jwe-number-float",
}  # fmt: skip
_DIFFERENT = {
    # COCONUT's does not look at the curve or at `enc`; its process ends, ours lets the kernel judge the header.
    "jwe-epk-no-crv": "kernel-judges",
    "jwe-no-enc": "kernel-judges",
    # Evidence goes where the operator said, or nowhere.
    "attest-redirect-302": "refused",
    "attest-redirect-307": "refused",
    # The status of /auth counts.
    "auth-500-valid-body": "closed",
    # An array in place of the object, a TEE that cannot be served: refused at the first frame.
    "negotiation-as-array": "closed-early",
    "tee-tdx": "closed-early",
    # A header that names a member twice is ambiguous: not forwarded.
    "jwe-duplicate-extra": "refused",
    # An announced length is refused from its eight bytes.
    "oversized-length-64MiB": "closed-early",
}
_SEVERAL_CONNECTIONS = {"two-connections-at-once", "two-connections-first-fails", "two-connections-in-sequence"}
_NOT_A_CONNECTION = {"stale-socket"}


class _Broker(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: list[dict[str, Any]]
    seen: list[dict[str, Any]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items() if name.lower() != "host"}
        self.seen.append({"method": self.command, "path": self.path, "headers": headers, "body": body.decode()})
        if not self.script:
            time.sleep(3)
            return
        reply = self.script.pop(0)
        data = (reply["body"] or "").encode()
        self.send_response_only(reply["status"])
        for name, value in reply["headers"]:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def _broker(script: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    seen: list[dict[str, Any]] = []
    handler = type("Scripted", (_Broker,), {"script": list(script), "seen": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def _proxy(folder: Path, url: str) -> Iterator[Path]:
    path = folder / "serial.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(8)
        stop, stopper = socket.socketpair()
        stack.enter_context(stop)
        stack.enter_context(stopper)
        limits = Limits(exchange_s=0.5, handshake_s=5.0)
        thread = threading.Thread(target=serve, args=(listener, url), kwargs={"limits": limits, "stop": stop.fileno()})
        thread.start()
        try:
            yield path
        finally:
            stopper.send(b"x")
            thread.join()


class _Kernel:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.settimeout(5)
        self.frames: list[str] = []
        self.ended = False

    def read(self) -> None:
        """One frame, or the end of the stream."""
        try:
            head = self._exactly(8)
            if head:
                self.frames.append(self._exactly(int.from_bytes(head, "little")).decode())
                return
        except ConnectionResetError:
            pass
        self.ended = True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                return b""
            data += more
        return data


def _play(record: dict[str, Any], folder: Path) -> tuple[_Kernel, list[dict[str, Any]]]:
    events = record["events"]
    script = [event for event in events if event["from"] == "kbs"]
    down = record["scenario"] == "kbs-down"
    if record["scenario"] == "kbs-hangs":
        script = script[:1]
    with _broker(script) as (url, seen), _proxy(folder, "http://127.0.0.1:9" if down else url) as path:
        kernel = _Kernel(path)
        for event in events:
            if event["from"] == "svsm":
                data = b""
                if "json" in event:
                    data = bytes.fromhex(event["length_prefix"]) + event["json"].encode()
                elif "raw" in event:
                    data = bytes.fromhex(event["raw"])
                with contextlib.suppress(BrokenPipeError):
                    kernel.socket.sendall(data)
            elif event["from"] == "proxy" and event["to"] == "svsm" and "json" in event:
                kernel.read()
        with contextlib.suppress(OSError):
            kernel.socket.shutdown(socket.SHUT_WR)
        while not kernel.ended:
            kernel.read()
        kernel.socket.close()
        return kernel, list(seen)


def _recorded(record: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    frames = [e["json"] for e in record["events"] if e["from"] == "proxy" and e["to"] == "svsm" and "json" in e]
    requests = [e for e in record["events"] if e["from"] == "proxy" and e["to"] == "kbs"]
    return frames, requests


def _same_requests(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [(r["method"], r["path"]) for r in ours] == [(r["method"], r["path"]) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["body"] == other["body"]
        assert mine["headers"] == other["headers"]


def _scenarios() -> list[str]:
    try:
        folder = vectors("aproxy")
    except BaseException:  # skipped or failed inside the test, where pytest can say so
        return ["success"]
    return sorted(path.stem for path in folder.glob("*.json"))


_ONE_CONNECTION = [name for name in _scenarios() if name not in _SEVERAL_CONNECTIONS | _NOT_A_CONNECTION]


@pytest.mark.parametrize("scenario", _ONE_CONNECTION)
def test_recorded_exchange(scenario: str, tmp_path: Path) -> None:
    record = json.loads((vectors("aproxy") / f"{scenario}.json").read_text(encoding="utf-8"))
    kernel, requests = _play(record, tmp_path)
    frames, their_requests = _recorded(record)
    kind = _DIFFERENT.get(scenario)
    if kind in {"closed", "closed-early"}:
        assert kernel.frames == []
        assert kernel.ended
        if kind == "closed-early":
            assert requests == []
        return
    if kind == "refused":
        assert kernel.frames == [frames[0], _FAILURE]
        return
    if scenario in _ANSWERS_FAILURE:
        assert kernel.frames == [*frames, _FAILURE]
        assert [r["path"] for r in requests] == [r["path"] for r in their_requests]
        return
    if scenario in _KEEPS_HEADER or kind == "kernel-judges":
        answer = json.loads(kernel.frames[1])
        sent = next(e for e in reversed(record["events"]) if e["from"] == "kbs")
        assert base64.b64decode(answer["decryption"]["aad"]).decode() == json.loads(sent["body"])["protected"]
        _same_requests(requests, their_requests)
        if kind is None:
            theirs = json.loads(frames[1])
            theirs["decryption"]["aad"] = answer["decryption"]["aad"]
            assert answer == theirs
        return
    if scenario == "close-while-kbs-answers":
        assert kernel.frames[:1] == frames  # the answer comes too late for a kernel that has gone
        return
    assert kernel.frames == frames
    _same_requests(requests, their_requests)


def _record(scenario: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((vectors("aproxy") / f"{scenario}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("scenario", sorted(_KEEPS_HEADER))
def test_recorded_headers_were_written_again(scenario: str) -> None:
    """Of COCONUT's program (docs/UPSTREAM.md): what it forwards does not open what the broker sealed."""
    record = _record(scenario)
    sent = json.loads(next(e for e in reversed(record["events"]) if e["from"] == "kbs")["body"])["protected"]
    forwarded = json.loads(_recorded(record)[0][-1])["decryption"]["aad"]
    assert base64.b64decode(forwarded).decode() != sent
    assert record["jwe"]["opens_with_original_protected"]
    assert not record["jwe"]["opens_with_forwarded_aad"]


@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("oversized-length-2^62", "memory allocation of 4611686018427387904 bytes failed"),
        ("oversized-length-2^63", "panicked"),
        ("negotiation-malformed-json", "Error"),
        ("kbs-down", "Error"),
        ("close-at-once", "Error"),
    ],
)
def test_recorded_ends_of_the_process(scenario: str, says: str) -> None:
    """Of COCONUT's program: one bad connection ends all."""
    after = _record(scenario)["process_after"]
    assert not after["still_running"]
    assert says in after["stderr"]


def test_a_recorded_status_did_not_count_and_redirects_were_followed() -> None:
    """Of COCONUT's program: a 500 with a good body is used; evidence goes where the answer points."""
    assert "challenge" in json.loads(_recorded(_record("auth-500-valid-body"))[0][0])
    for scenario in ("attest-redirect-302", "attest-redirect-307"):
        events = _record(scenario)["events"]
        asked = [event["path"] for event in events if event["from"] == "proxy" and event["to"] == "kbs"]
        assert asked[1:3] == ["/kbs/v0/attest", "/kbs/v0/attest?again=1"]


def test_several_kernels_at_once_and_a_bad_one_first(tmp_path: Path) -> None:
    record = json.loads((vectors("aproxy") / "success.json").read_text(encoding="utf-8"))
    frames, _ = _recorded(record)
    script = [event for event in record["events"] if event["from"] == "kbs"]
    messages = [e for e in record["events"] if e["from"] == "svsm" and "json" in e]
    with _broker([script[0]] * 2 + [script[1], script[2]]) as (url, _), _proxy(tmp_path, url) as path:
        bad, idle, good = _Kernel(path), _Kernel(path), _Kernel(path)
        bad.socket.sendall(b"\xff" * 64)
        bad.read()
        assert bad.ended
        for kernel in (idle, good):
            kernel.socket.sendall(bytes.fromhex(messages[0]["length_prefix"]) + messages[0]["json"].encode())
            kernel.read()
        good.socket.sendall(bytes.fromhex(messages[1]["length_prefix"]) + messages[1]["json"].encode())
        good.read()
        assert good.frames == frames
        assert idle.frames == frames[:1]
        for kernel in (bad, idle, good):
            kernel.socket.close()
