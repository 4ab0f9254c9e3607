# SPDX-License-Identifier: MIT OR Apache-2.0
"""The broker's HTTP surface: requests in, responses out, no sockets (those are in `svsm.broker.http`).

COCONUT's dialect of the KBS protocol plus our channel. Errors have the KBS shape with a stable code of ours, and
statuses that say what happened (Trustee answers 401 to nearly everything; relays only look whether it is 200).
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable

from svsm.broker.http import HttpServer, Request, Response
from svsm.broker.service import Broker
from svsm.formats.errors import BackendError, FormatError, ProtocolError, SvsmError
from svsm.formats.kbs import (
    ATTEST_PATH,
    AUTH_PATH,
    CHANNEL_PATH,
    RESOURCE_PREFIX,
    AttestAnswer,
    AuthAnswer,
    AuthRequest,
    ChannelBody,
    ErrorBody,
    format_cookie,
    parse_cookie_header,
    parse_resource_path,
)
from svsm.formats.release_token import SESSION_BYTES

__all__ = ["BrokerApp", "serve"]

_RESOURCE = ("default", "sample", "test")
"""The one resource: the key of the session's own volume, under the name that COCONUT's proxy asks for."""

_ERRORS: dict[str, tuple[int, str]] = {
    "broker-session-unknown": (401, "InvalidCookie"),
    "broker-not-attested": (401, "UnauthenticatedCookie"),
    "broker-challenge-used": (409, "ChallengeUsed"),
    "broker-evidence-refused": (403, "AttestationFailed"),
    "broker-measurement-not-allowed": (403, "PolicyDeny"),
    "broker-channel-refused": (403, "PolicyDeny"),
    "broker-busy": (429, "TooManySessions"),
    "broker-path": (404, "InvalidRequestPath"),
    "broker-method": (405, "InvalidRequest"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Route:
    method: str
    handle: Callable[[Request], Response]


class BrokerApp:
    """Routes requests to a broker. Never raises."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._routes = {
            AUTH_PATH: _Route("POST", self._auth),
            ATTEST_PATH: _Route("POST", self._attest),
            CHANNEL_PATH: _Route("POST", self._channel),
        }

    def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            return self._route(request)
        except SvsmError as error:
            return _error(error)

    def _route(self, request: Request) -> Response:
        route = self._routes.get(request.target)
        if route is None and request.target.startswith(RESOURCE_PREFIX):
            route = _Route("GET", self._resource)
        if route is None:
            raise ProtocolError("there is nothing at this path", code="broker-path")
        if request.method != route.method:
            raise ProtocolError("this path knows another method", code="broker-method", allow=route.method)
        return route.handle(request)

    def _auth(self, request: Request) -> Response:
        AuthRequest.parse(request.body)
        session, challenge = self._broker.challenge()
        return _json(AuthAnswer(nonce=challenge).pack(), session)

    def _attest(self, request: Request) -> Response:
        session = _session(request)
        return _json(AttestAnswer(token=self._broker.attest(session, request.body)).pack(), session)

    def _resource(self, request: Request) -> Response:
        session = _session(request)
        if parse_resource_path(request.target) != _RESOURCE:
            raise ProtocolError("there is no such resource", code="broker-path")
        return _json(self._broker.resource(session), None)

    def _channel(self, request: Request) -> Response:
        session = _session(request)
        answer = self._broker.channel(session, ChannelBody.parse(request.body).frame)
        return _json(ChannelBody(frame=answer).pack(), None)


def serve(broker: Broker, listener: socket.socket) -> HttpServer:
    """A server for `broker` on a listening socket; call its `run` (blocks) or `start` (thread), and its `stop`."""

    def tick() -> None:
        # Where the database fails, the counts stay, and the next tick tries again.
        with contextlib.suppress(SvsmError):
            broker.flush_audit()

    return HttpServer(BrokerApp(broker), listener, tick=tick)


def _session(request: Request) -> bytes:
    text = parse_cookie_header(request.cookie)
    try:
        session = bytes.fromhex(text or "")
    except ValueError:
        session = b""
    if len(session) != SESSION_BYTES or session.hex() != text:
        raise ProtocolError("there is no such session, or it has expired", code="broker-session-unknown")
    return session


def _json(body: bytes, session: bytes | None) -> Response:
    cookie = () if session is None else (("Set-Cookie", format_cookie(session.hex())),)
    return Response(200, (("Content-Type", "application/json"), ("Cache-Control", "no-store"), *cookie), body)


def _error(error: SvsmError) -> Response:
    status, variant = _ERRORS.get(error.code, (0, ""))
    code, message = error.code, error.message
    if not status and isinstance(error, FormatError | ProtocolError):
        status, variant = 400, "InvalidRequest"
    elif not status:
        # What broke inside is for the owner's log; details may name paths.
        status, variant, code, message = 500, "InternalError", "broker-internal", "the broker failed"
        if isinstance(error, BackendError):
            status = 503
    headers = [("Content-Type", "application/json")]
    if status in (429, 503):
        headers.append(("Retry-After", "5"))
    if status == 405:
        headers.append(("Allow", str(error.details.get("allow", ""))))
    return Response(status, tuple(headers), ErrorBody(variant=variant, detail=message, code=code).pack())
