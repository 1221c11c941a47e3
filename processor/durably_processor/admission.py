"""What may be taken in: whether a record belongs on the topic and partition where it was found, and fits."""

from __future__ import annotations

from functools import lru_cache

from durably import attributes, tokens
from durably.broker.port import Message
from durably.children import LONGEST_REASON
from durably.errors import RecordTooLarge
from durably.identifiers import LONGEST_ID, LONGEST_RUN_ID
from durably_schemas import Catalogue, CodecError
from durably_schemas import records as rec
from durably_schemas.catalogue import partition_for

LATEST = 10_000 * 366 * 24 * 60 * 60 * 1000
"""Milliseconds: beyond every instant of a datetime, and so that sums of a few of them still fit into records."""

KEYED_BY_TOKEN = frozenset({rec.ResumeHook, rec.ClaimToken, rec.ReleaseToken})
"""Records whose key is their token's routing key; that of all others is their run's id."""
HOMES = 20_000
"""Keys whose partition is remembered."""


class Admission:
    """The rules of one partition.

    Args:
        number: of the partition.
        catalogue: of the topics.
        max_payload_bytes: what a payload may have, so that it fits into every record that is made of it.
    """

    def __init__(self, number: int, catalogue: Catalogue, max_payload_bytes: int) -> None:
        self._number = number
        # Asked for every record, and murmur2 costs as much as decoding one: most are about a run that was asked for before.
        self._home = lru_cache(HOMES)(lambda key: partition_for(key, catalogue.partitions))
        self._max_payload_bytes = max_payload_bytes
        self._owners: dict[str, frozenset[type[rec.Record]]] = {
            catalogue.commands: frozenset(
                {rec.StartRun, rec.QueryRun, rec.CancelRun, rec.ResetRun, rec.ResumeHook, rec.WatchRun}
            ),
            catalogue.results: frozenset({rec.StepResult, rec.StepHeartbeat, rec.StepClaim}),
            catalogue.signals: frozenset(
                {
                    *(rec.ClaimToken, rec.TokenGranted, rec.TokenRefused, rec.ReleaseToken, rec.HookDelivery),
                    *(rec.ChildFinished, rec.RunCopied),
                }
            ),
        }

    def check(self, message: Message, record: rec.Record) -> None:
        """Raises `CodecError`, saying why, for a record that must not be taken in."""
        kind = type(record)
        if kind not in self._owners[message.topic]:
            raise CodecError(f"a {kind.__name__} does not belong on {message.topic}")
        if kind in KEYED_BY_TOKEN or (isinstance(record, rec.QueryRun) and not record.run_id):
            self._check_token(message, record.token)  # type: ignore[attr-defined]
        else:
            self._check_run_id(message, record.run_id)  # type: ignore[attr-defined]
        reply_to: rec.ReplyTo | None = getattr(record, "reply_to", None)
        if reply_to is not None:
            _check_id(reply_to.request_id, "request_id")
        if isinstance(record, rec.StartRun):
            self._check_start(record)
        elif isinstance(record, rec.WatchRun):
            _check_id(record.watcher_run_id, "watcher_run_id")
            _check_id(record.correlation_id, "correlation_id")
        elif isinstance(record, rec.ResumeHook):
            _check_id(record.resume_id, "resume_id")
            self._check_payload(record.payload, "payload")
        elif isinstance(record, rec.StepHeartbeat):
            _check_time(record.started_at, "started_at")
            _check_time(max(0, record.lease_until - record.sent_at), "a lease")
        elif isinstance(record, rec.StepResult):
            if isinstance(record.outcome, rec.StepFailed):
                _check_time(max(0, record.outcome.retry_after or 0), "retry_after")
        elif isinstance(record, rec.ResetRun):
            _run_key(record.new_run_id)
            _check_new_id(record.new_run_id)
            if record.new_run_id == record.run_id:
                raise CodecError(
                    f"run {record.run_id!r} cannot go on in its own place: the new run's id must be another"
                )
        if isinstance(record, rec.CancelRun | rec.ResetRun) and len(record.reason or "") > LONGEST_REASON:
            raise CodecError(f"a reason of {len(record.reason or ''):,} characters: {LONGEST_REASON:,} at most")

    def _check_run_id(self, message: Message, run_id: str) -> None:
        key = _run_key(run_id)
        if message.key != key:
            raise CodecError(f"key {message.key!r:.100} is not the run_id {run_id!r}")
        self._check_home(key)

    def _check_start(self, record: rec.StartRun) -> None:
        _check_new_id(record.run_id)
        try:
            attributes.check_size(record.attributes)
        except RecordTooLarge as e:
            raise CodecError(str(e)) from e
        if record.parent is not None:
            for name in ("run_id", "root_run_id", "correlation_id"):
                _check_id(getattr(record.parent, name), f"the parent's {name}")
        if record.rerun_of is not None:
            _check_id(record.rerun_of, "rerun_of")
        self._check_payload(record.input, "input")

    def _check_token(self, message: Message, token: str | None) -> None:
        if not token or len(token.encode()) > tokens.LONGEST + LONGEST_RUN_ID:
            raise CodecError(f"token {token!r:.100}: 1 to {tokens.LONGEST} bytes")
        if token.startswith(tokens.PREFIX) and tokens.run_of(token) is None:
            raise CodecError(
                f"token {token!r:.100} names no run: one that begins with {tokens.PREFIX!r} ends with its run's id"
            )
        key = tokens.routing_key(token).encode()
        if message.key != key:
            raise CodecError(f"key {message.key!r:.100} is not {key!r}, as the token {token!r:.100} demands")
        self._check_home(key)

    def _check_payload(self, payload: rec.Payload, what: str) -> None:
        size = len(payload.data)
        if size > self._max_payload_bytes:
            raise CodecError(
                f"{what} of {size:,} bytes, {self._max_payload_bytes:,} at most: pass large data by reference"
            )

    def _check_home(self, key: bytes) -> None:
        home = self._home(key)
        if home != self._number:
            raise CodecError(
                f"key {key!r} belongs on partition {home}, not {self._number}: "
                "set the producer's partitioner to murmur2_random, the Java default"
            )


def _run_key(run_id: str) -> bytes:
    """The key of records about a run. Raises `CodecError` where no run may have this id."""
    key = run_id.encode()
    if not run_id or len(key) > LONGEST_RUN_ID or not run_id.isprintable() or "|" in run_id:
        raise CodecError(f"run_id {run_id!r:.100}: 1 to {LONGEST_RUN_ID} bytes, printable, without '|'")
    return key


def _check_new_id(run_id: str) -> None:
    if run_id.startswith(tokens.PREFIX):
        raise CodecError(f"run_id {run_id!r} begins with {tokens.PREFIX!r}, which is reserved for hooks")


def _check_time(ms: int, what: str) -> None:
    # Timers are made of it, and events.
    if not 0 <= ms <= LATEST:
        raise CodecError(f"{what} of {ms} ms: 0 to {LATEST}")


def _check_id(text: str, what: str) -> None:
    # It goes into records that are made of this one, some of which hold many.
    size = len(text.encode())
    if not 0 < size <= LONGEST_ID:
        raise CodecError(f"{what} of {size:,} bytes: 1 to {LONGEST_ID:,}")
