# SPDX-License-Identifier: MIT OR Apache-2.0
"""The broker's database: volume rows, allowed launch digests, the audit trail. SQLite, one file.

The only module of the broker that speaks SQL. Every change is one transaction (BEGIN IMMEDIATE, so two processes on
one file queue up) together with its audit line, durable when it returns (synchronous=FULL). The schema has a version
in `user_version`; a newer one is refused, never guessed at.

One connection, used by one thread at a time behind a lock; open it after a fork, not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from svsm.broker.audit import FIRST_HASH, AuditLine
from svsm.formats.errors import BackendError, PolicyError, StateError
from svsm.formats.release_token import VolumeState

__all__ = ["SCHEMA_VERSION", "Birth", "Store", "Volume"]

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x5356534D
_BUSY_SECONDS = 10.0

_SCHEMA = """
CREATE TABLE volumes (
    volume_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    configuration BLOB NOT NULL,
    host_data BLOB NOT NULL UNIQUE CHECK (length(host_data) = 32),
    root TEXT NOT NULL,
    wrapped_key BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('new', 'active')),
    created_at TEXT NOT NULL,
    attestations INTEGER NOT NULL DEFAULT 0,
    last_session BLOB,
    birth_session BLOB,
    birth_counter BLOB,
    birth_root BLOB,
    CHECK ((state = 'new') = (birth_session IS NULL))
) STRICT;
CREATE TABLE allowed (
    volume_id TEXT NOT NULL REFERENCES volumes (volume_id),
    digest BLOB NOT NULL CHECK (length(digest) = 48),
    added_at TEXT NOT NULL,
    PRIMARY KEY (volume_id, digest)
) STRICT;
CREATE TABLE audit (
    sequence INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    event TEXT NOT NULL,
    decision TEXT NOT NULL,
    reason TEXT,
    volume_id TEXT,
    session TEXT,
    details TEXT NOT NULL,
    hash BLOB NOT NULL
) STRICT;
"""

_COLUMNS = (
    "volume_id, name, configuration, host_data, root, wrapped_key, state, created_at, attestations, last_session, "
    "birth_session, birth_counter, birth_root"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Birth:
    """How a volume became active."""

    session: bytes
    counter: bytes
    root: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Volume:
    """One row."""

    volume_id: str
    name: str
    configuration: bytes
    """Canonical JSON of its launch configuration."""
    host_data: bytes
    root: str
    """The accepted root: ``amd``, ``amd:Milan``, ``simulated:<fingerprint>``, …"""
    wrapped_key: bytes = dataclasses.field(repr=False)
    state: VolumeState
    created_at: str
    attestations: int
    """How many were granted."""
    last_session: bytes | None
    birth: Birth | None


class Store:
    """The open database.

    Args:
        path: The file; created with mode 0600.
        now: Wall time, with time zone, for `created_at` and the audit trail.

    Raises:
        StateError: ``broker-schema-newer`` or ``broker-schema-foreign``.
        BackendError: ``broker-database``.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime.datetime]) -> None:
        self._now = now
        self._lock = threading.RLock()
        with _database_errors():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # Without close(), as after an error below, the database is closed when the store is dropped.
            weakref.finalize(self, self._connection.close).atexit = False
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._prepare_schema()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    def add(self, volume: Volume, *, digests: Sequence[bytes]) -> None:
        """Insert a row with its first allowed digests.

        Raises:
            StateError: ``broker-volume-exists``.
        """
        values = (volume.volume_id, volume.name, volume.configuration, volume.host_data, volume.root)
        with self._transaction() as connection:
            try:
                connection.execute(
                    f"INSERT INTO volumes ({_COLUMNS}) VALUES (?,?,?,?,?,?,'new',?,0,NULL,NULL,NULL,NULL)",
                    (*values, volume.wrapped_key, self._timestamp()),
                )
            except sqlite3.IntegrityError:
                raise StateError(
                    "the broker has this volume already", code="broker-volume-exists", volume=volume.volume_id
                ) from None
            details = {"name": volume.name, "root": volume.root, "host_data": volume.host_data.hex()}
            self._audit(connection, event="volume-create", volume_id=volume.volume_id, details=details)
            for digest in digests:
                self._allow(connection, volume.volume_id, digest)

    def allow(self, volume_id: str, digest: bytes) -> bool:
        """Put a launch digest (48 bytes) on a volume's list; False when it was there already."""
        with self._transaction() as connection:
            return self._allow(connection, volume_id, digest)

    def volumes(self) -> list[Volume]:
        """All rows, by name."""
        rows = self._query(f"SELECT {_COLUMNS} FROM volumes ORDER BY name, volume_id", ())
        return [_volume(row) for row in rows]

    def by_host_data(self, host_data: bytes) -> Volume | None:
        """The row of a launch configuration."""
        rows = self._query(f"SELECT {_COLUMNS} FROM volumes WHERE host_data = ?", (host_data,))
        return _volume(rows[0]) if rows else None

    def digests(self, volume_id: str) -> list[bytes]:
        """A volume's allowed launch digests."""
        rows = self._query("SELECT digest FROM allowed WHERE volume_id = ? ORDER BY digest", (volume_id,))
        return [bytes(row[0]) for row in rows]

    def attested(self, volume_id: str, *, session: bytes, measurement: bytes, details: dict[str, str]) -> Volume:
        """Record a granted attestation; `session` is from now on the one that attested last.

        The digest's place on the list is read again inside the transaction: it may have changed meanwhile.

        Returns:
            The row as it is in this transaction; its state goes into the token.

        Raises:
            PolicyError: ``broker-measurement-not-allowed``.
        """
        with self._transaction() as connection:
            allowed = connection.execute(
                "SELECT 1 FROM allowed WHERE volume_id = ? AND digest = ?", (volume_id, measurement)
            ).fetchone()
            if allowed is None:
                raise PolicyError("the launch digest is not allowed", code="broker-measurement-not-allowed")
            connection.execute(
                "UPDATE volumes SET last_session = ?, attestations = attestations + 1 WHERE volume_id = ?",
                (session, volume_id),
            )
            self._audit(connection, event="attest", volume_id=volume_id, session=session, details=details)
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM volumes WHERE volume_id = ?",
                (volume_id,),
            ).fetchone()
            return _volume(row)

    def formatted(self, volume_id: str, *, session: bytes, counter: bytes, root: bytes) -> str | None:
        """New → active, or the same report once more. One transaction.

        Returns:
            None when this state is the recorded one now; else the code of the refusal.
        """
        with self._transaction() as connection:
            moved = connection.execute(
                "UPDATE volumes SET state = 'active', birth_session = ?, birth_counter = ?, birth_root = ? "
                "WHERE volume_id = ? AND state = 'new' AND last_session = ?",
                (session, counter, root, volume_id, session),
            ).rowcount
            row = connection.execute(
                "SELECT state, birth_session, birth_counter, birth_root FROM volumes WHERE volume_id = ?", (volume_id,)
            ).fetchone()
            reason = None
            if not moved:
                if row is None or row[0] != VolumeState.ACTIVE:
                    reason = "broker-not-last-attested"
                elif tuple(row[1:]) != (session, counter, root):
                    reason = "broker-already-active"
            details = {"counter": counter.hex(), "root": root.hex(), "repeated": "no" if moved else "yes"}
            self._audit(
                connection, event="formatted", volume_id=volume_id, session=session, reason=reason, details=details
            )
            return reason

    def record(
        self,
        event: str,
        *,
        reason: str | None,
        volume_id: str | None,
        session: bytes | None,
        details: dict[str, str],
    ) -> None:
        """Write an audit line of its own."""
        with self._transaction() as connection:
            self._audit(connection, event=event, reason=reason, volume_id=volume_id, session=session, details=details)

    def audit_lines(self) -> list[AuditLine]:
        """The whole trail in order."""
        rows = self._query(
            "SELECT sequence, at, event, decision, reason, volume_id, session, details, hash FROM audit "
            "ORDER BY sequence",
            (),
        )
        return [_line(row) for row in rows]

    def _allow(self, connection: sqlite3.Connection, volume_id: str, digest: bytes) -> bool:
        added = connection.execute(
            "INSERT OR IGNORE INTO allowed (volume_id, digest, added_at) VALUES (?,?,?)",
            (volume_id, digest, self._timestamp()),
        ).rowcount
        if added:
            self._audit(connection, event="volume-allow", volume_id=volume_id, details={"digest": digest.hex()})
        return bool(added)

    def _audit(
        self,
        connection: sqlite3.Connection,
        *,
        event: str,
        volume_id: str | None,
        details: dict[str, str],
        session: bytes | None = None,
        reason: str | None = None,
    ) -> None:
        last = connection.execute("SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1").fetchone()
        line = AuditLine.following(
            (last[0], bytes(last[1])) if last else (0, FIRST_HASH),
            at=self._timestamp(),
            event=event,
            reason=reason,
            volume_id=volume_id,
            session=session,
            details=details,
        )
        connection.execute(
            "INSERT INTO audit VALUES (?,?,?,?,?,?,?,?,?)",
            (
                line.sequence,
                line.at,
                line.event,
                line.decision,
                line.reason,
                line.volume_id,
                line.session,
                line.details_json(),
                line.hash,
            ),
        )

    def _timestamp(self) -> str:
        return self._now().astimezone(datetime.UTC).isoformat(timespec="milliseconds")

    def _query(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._lock, _database_errors():
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _database_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _prepare_schema(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            application = self._connection.execute("PRAGMA application_id").fetchone()[0]
            tables = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if version == 0 and application == 0 and tables == 0:
                for statement in _SCHEMA.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            elif application != _APPLICATION_ID:
                raise StateError("the file is not a broker's database", code="broker-schema-foreign")
            elif version != SCHEMA_VERSION:
                raise StateError(
                    "the broker's database was written by a newer version",
                    code="broker-schema-newer",
                    hint="use the svsm version that wrote it, or a later one",
                    expected=SCHEMA_VERSION,
                    got=version,
                )
        except BaseException:
            self._connection.execute("ROLLBACK")
            self._connection.close()
            raise
        self._connection.execute("COMMIT")


@contextlib.contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise BackendError(f"the broker's database failed: {error}", code="broker-database") from None


def _volume(row: Sequence[Any]) -> Volume:
    return Volume(
        volume_id=row[0],
        name=row[1],
        configuration=row[2],
        host_data=row[3],
        root=row[4],
        wrapped_key=row[5],
        state=VolumeState(row[6]),
        created_at=row[7],
        attestations=row[8],
        last_session=row[9],
        birth=None if row[10] is None else Birth(session=row[10], counter=row[11], root=row[12]),
    )


def _line(row: Sequence[Any]) -> AuditLine:
    return AuditLine(
        sequence=row[0],
        at=row[1],
        event=row[2],
        decision=row[3],
        reason=row[4],
        volume_id=row[5],
        session=row[6],
        details=json.loads(row[7]),
        hash=row[8],
    )
