# SPDX-License-Identifier: MIT OR Apache-2.0
"""HTTP to the broker: three requests of the KBS protocol and the run-time channel, with a cookie jar per session.

One kept-alive HTTP/1.1 connection, as COCONUT's proxy has it. Two things differ from it on purpose: redirects are
not followed (evidence goes where the operator said, or nowhere), and the status of /auth counts.

Every answer is bounded in size and in time, the whole exchange, not each read: a broker that sends a byte a minute
is cut off at the deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import http.cookiejar
import ipaddress
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

from svsm.formats.errors import BackendError, PolicyError, ProtocolError, StateError
from svsm.formats.kbs import (
    ATTEST_PATH,
    AUTH_PATH,
    CHANNEL_PATH,
    DEFAULT_RESOURCE_PATH,
    MAX_BODY_BYTES,
    AttestAnswer,
    AttestRequest,
    AuthAnswer,
    AuthRequest,
    ChannelBody,
    ErrorBody,
    Jwe,
)

__all__ = ["KbsClient", "check_url"]


def check_url(url: str) -> urllib.parse.SplitResult:
    """Take a broker's URL apart.

    Raises:
        StateError: ``proxy-url`` unless it is http or https with a host, and no query or fragment.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username:
        raise StateError(
            f"{url} is not the address of a broker", code="proxy-url", hint="it looks like http://127.0.0.1:8080"
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KbsClient:
    """One session with a broker.

    Args:
        url: ``http://host:port[/prefix]`` or https.
        timeout_s: For each whole exchange.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        parts = check_url(url)
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._prefix = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        host, port = parts.hostname or "", parts.port
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(
                host, port, timeout=timeout_s, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        # As cookie stores commonly do, a loopback address counts as secure: `Secure` cookies travel to it over http.
        secure = ("https", "http") if _is_loopback(host) else ("https",)
        self._jar = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(secure_protocols=secure))
        self._was_cut = False

    def close(self) -> None:
        """End the session's connection."""
        self._connection.close()

    def authenticate(self) -> bytes:
        """POST /auth: the challenge.

        Raises:
            BackendError: ``proxy-broker-unreachable``.
            PolicyError: ``proxy-refused`` for any status but 200.
            FormatError: ``json-*``.
        """
        return AuthAnswer.parse(self._request("POST", AUTH_PATH, AuthRequest().pack())).nonce

    def attest(self, request: AttestRequest) -> str:
        """POST /attest: the token, unread. Raises as `authenticate`."""
        return AttestAnswer.parse(self._request("POST", ATTEST_PATH, request.pack())).token

    def resource(self) -> Jwe:
        """GET the resource that COCONUT's proxy asks for. Raises as `authenticate`."""
        return Jwe.parse(self._request("GET", DEFAULT_RESOURCE_PATH, None))

    def channel(self, frame: bytes) -> bytes:
        """POST one sealed channel message, get the sealed answer. Raises as `authenticate`."""
        return ChannelBody.parse(self._request("POST", CHANNEL_PATH, ChannelBody(frame).pack())).frame

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self._base + path)
        self._jar.add_cookie_header(request)
        headers = {"Accept": "*/*"}
        if body is not None:
            headers = {"Content-Type": "application/json", **headers}
        cookie = request.get_header("Cookie")
        if cookie is not None:
            headers["Cookie"] = cookie
        try:
            with self._deadline():
                response = self._exchange(method, self._prefix + path, body, headers)
                data = response.read(MAX_BODY_BYTES + 1)
        except (OSError, http.client.HTTPException) as failed:
            self._connection.close()
            raise BackendError(
                "the broker does not answer",
                code="proxy-broker-unreachable",
                hint="check the URL, and that `svsm broker serve` runs there",
                reason=type(failed).__name__,
            ) from failed
        self._jar.extract_cookies(response, request)
        if len(data) > MAX_BODY_BYTES:
            self._connection.close()
            raise ProtocolError("the broker's answer is too long", code="proxy-answer-too-long", path=path)
        if response.status != http.client.OK:
            raise PolicyError(
                "the broker refuses",
                code="proxy-refused",
                path=path,
                status=response.status,
                reason=ErrorBody.code_of(data),
            )
        return data

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        fresh = self._connection.sock is None
        try:
            self._send(method, path, body, headers)
            return self._connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            # A kept-alive connection may have been closed by the other side since; a fresh one was not.
            self._connection.close()
            if fresh or self._was_cut:
                raise
            self._send(method, path, body, headers)
            return self._connection.getresponse()

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> None:
        self._connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            self._connection.putheader(name, value)
        if body is not None:
            self._connection.putheader("Content-Length", str(len(body)))
        self._connection.endheaders(body)

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        self._was_cut = False
        timer = threading.Timer(self._timeout_s, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self) -> None:
        self._was_cut = True
        transport = self._connection.sock
        if transport is not None:
            with contextlib.suppress(OSError):
                transport.shutdown(socket.SHUT_RDWR)
