"""What a worker sends: results, heartbeats, claims, dead letters; and what their acknowledgements set free."""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from durably_schemas import CodecError
from durably_schemas.records import DeadLetter, Error, StepClaim, StepFailed, StepHeartbeat, StepResult

from durably import failures
from durably.errors import BrokerError, RecordTooLarge
from durably.observability import tracing
from durably.worker.execution import untold

if TYPE_CHECKING:
    from durably_schemas import Catalogue, Codec
    from durably_schemas.records import Record, ReplyTo

    from durably.broker.port import Headers, Message, Producer
    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock
    from durably.worker.execution import Outcome

logger = logging.getLogger("durably.worker")

RETRY = 1.0  # seconds until a result that could not be sent is sent again
REFUSALS = 30  # results in a row that the producer does not even take, after which it is taken for broken


class Outbox:
    """Sends through one idempotent producer. Every method may be called from any thread.

    Attributes:
        dead_letters: how many there were.
    """

    def __init__(
        self, producer: Producer, codec: Codec, catalogue: Catalogue, *, worker_id: str, max_bytes: int, clock: Clock
    ) -> None:
        self._producer = producer
        self._codec = codec
        self._results = catalogue.results
        self._dead_letters = catalogue.dead_letters
        self._worker_id = worker_id
        self._max_bytes = max_bytes
        self._clock = clock
        self._again: deque[tuple[float, Attempt, bytes]] = deque()
        self._refusals = 0
        self.dead_letters = 0

    def result(self, attempt: Attempt, outcome: Outcome) -> None:
        """Sends how an attempt ended; its offset is released when that is durable."""
        try:
            value = self._encode_result(attempt, outcome)
        except CodecError as e:
            why = f"what came of {attempt} does not fit its record: {e}"
            logger.error(why)  # noqa: TRY400 - the message says it all
            value = self._encode_result(attempt, untold(why))
        if len(value) > self._max_bytes:
            value = self._encode_result(attempt, self._shortened(attempt, outcome, len(value)))
        self._send_result(attempt, value)

    def heartbeat(self, attempt: Attempt, ttl: float, reply_to: ReplyTo | None = None) -> None:
        """Extends an attempt's lease by ``ttl`` seconds from now; its offset is released when that is durable.

        With ``reply_to`` it asks whether the attempt is still wanted.
        """
        request = attempt.request
        now = self._clock.now()
        beat = StepHeartbeat(
            run_id=request.run_id,
            step_id=request.step_id,
            attempt=request.attempt,
            worker=self._worker_id,
            started_at=attempt.started_at,
            lease_until=now + round(ttl * 1000),
            sent_at=now,
            reply_to=reply_to,
        )
        first = attempt.beat_at is None
        attempt.beat_at = self._clock.monotonic()
        try:
            self._send(beat, request.run_id, (), partial(self._heartbeat_acked, attempt, first))
        except BrokerError as e:
            self._heartbeat_acked(attempt, first, e, -1)

    def claim(self, attempt: Attempt, reply_to: ReplyTo) -> None:
        """Asks whether an attempt is still to be run. Whoever asks asks again: errors are only logged."""
        request = attempt.request
        record = StepClaim(
            run_id=request.run_id,
            step_id=request.step_id,
            attempt=request.attempt,
            worker=self._worker_id,
            reply_to=reply_to,
        )
        try:
            self._send(record, request.run_id, (), None)
        except BrokerError as e:
            logger.warning("could not ask about %s: %s", attempt, e)

    def dead_letter(self, message: Message, reason: str, attempt: Attempt | None = None) -> None:
        """Keeps a copy of a request that cannot be run. Errors are only logged: the copy is for people."""
        about = f"request at {message.topic}[{message.partition}]@{message.offset}"
        logger.error("%s cannot be run: %s", attempt or about, reason, extra=attempt.about if attempt else None)
        self.dead_letters += 1

        def encode(value: bytes | None) -> bytes:
            return self._codec.encode(
                DeadLetter(
                    topic=message.topic,
                    partition=message.partition,
                    offset=message.offset,
                    key=message.key,
                    value=value,
                    reason=reason[:10_000],
                    component=f"worker {self._worker_id}",
                    at=self._clock.now(),
                )
            )

        letter = encode(message.value)
        if len(letter) > self._max_bytes:
            letter = encode(None)
        try:
            self._producer.send(self._dead_letters, letter, key=message.key)
        except BrokerError as e:
            logger.error("no dead letter for the %s: %s", about, e)  # noqa: TRY400 - the message says it all

    def send_again(self) -> None:
        """Sends results again that failed a while ago. Raises `BrokerError` when the producer is beyond hope."""
        if self._refusals >= REFUSALS:
            raise BrokerError(
                f"results cannot be sent any more: the producer refused the last {self._refusals}; see the log"
            )
        for _ in range(len(self._again)):
            due, attempt, value = self._again.popleft()
            if due <= self._clock.monotonic():
                self._send_result(attempt, value)
            else:
                self._again.append((due, attempt, value))

    def _encode_result(self, attempt: Attempt, outcome: Outcome) -> bytes:
        request = attempt.request
        return self._codec.encode(
            StepResult(
                run_id=request.run_id,
                step_id=request.step_id,
                attempt=request.attempt,
                fingerprint=request.fingerprint,
                outcome=outcome,
                started_at=attempt.started_at,
                finished_at=self._clock.now(),
                worker=self._worker_id,
                streams=attempt.writers.written() if attempt.writers is not None else (),
            )
        )

    def _shortened(self, attempt: Attempt, outcome: Outcome, size: int) -> StepFailed:
        """What is reported instead of something larger than a record may be."""
        if isinstance(outcome, StepFailed):
            error = Error(type=outcome.error.type, message=outcome.error.message[:1000])
            return StepFailed(error=error, retry_after=outcome.retry_after, fatal=outcome.fatal)
        return StepFailed(
            error=failures.to_error(
                RecordTooLarge.of(f"the result of step {attempt.request.step}", size, self._max_bytes)
            ),
            fatal=True,
        )

    def _send_result(self, attempt: Attempt, value: bytes) -> None:
        headers = attempt.message.headers
        try:
            self._producer.send(
                self._results,
                value,
                key=attempt.request.run_id.encode(),
                headers=[h for h in headers if h[0] in tracing.HEADERS] if headers else (),
                on_ack=partial(self._result_acked, attempt, value),
            )
            self._refusals = 0
        except BrokerError as e:
            self._refusals += not isinstance(e, RecordTooLarge)
            self._result_acked(attempt, value, e, -1)

    def _result_acked(self, attempt: Attempt, value: bytes, error: Exception | None, _: int) -> None:
        if error is None:
            attempt.release()
            return
        logger.error("the result of %s could not be sent: %s", attempt, error, extra=attempt.about)
        if isinstance(error, RecordTooLarge):
            failed = self._shortened(attempt, self._codec.decode_as(StepResult, value).outcome, len(value))
            shorter = self._encode_result(attempt, failed)
            value = shorter if len(shorter) < len(value) else value
        self._again.append((self._clock.monotonic() + RETRY, attempt, value))

    def _heartbeat_acked(self, attempt: Attempt, first: bool, error: Exception | None, _: int) -> None:
        if error is None:
            attempt.release()
            return
        logger.warning("a heartbeat of %s could not be sent: %s", attempt, error)
        if first:
            attempt.beat_at = None  # not a lease after all: the next look tries again

    def _send(self, record: Record, run_id: str, headers: Headers, on_ack: partial[None] | None) -> None:
        self._producer.send(
            self._results, self._codec.encode(record), key=run_id.encode(), headers=headers, on_ack=on_ack
        )
