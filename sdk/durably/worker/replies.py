"""What processors answer to a worker: one partition of ``replies``, read while an answer may come."""

from __future__ import annotations

import logging
import random
import threading
from typing import TYPE_CHECKING, Protocol

from durably_schemas import CodecError
from durably_schemas.records import Reply

from durably.broker.port import TP, Message
from durably.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from durably_schemas import Codec

    from durably.broker.port import Broker
    from durably.worker.clock import Clock

logger = logging.getLogger("durably.worker")

IDLE = 10.0  # seconds without a question after which nobody reads ``replies`` any more
TICK = 0.1  # seconds between two looks at what is to be asked
FIRST, LAST = 1.0, 10.0  # seconds until reading is tried again after an error, doubling


class Asker(Protocol):
    """Somebody with questions; called on the thread that reads the answers."""

    def waits(self) -> bool:
        """Whether an answer may come. Must not block."""

    def ask(self, partition: int) -> None:
        """Sends the questions that are due; the answers are to go to this partition."""

    def take(self, reply: Reply) -> None:
        """An answer; perhaps to somebody else."""


class Replies:
    """Reads one partition of ``replies`` while one of the askers waits.

    Its end is known before the first question is sent, so that no answer can be missed; and a worker without questions
    pays nothing.

    Args:
        broker: where ``replies`` is read.
        topic: the topic.
        codec: decodes the answers.
        start_thread: runs a function on a thread whose errors stop the worker.
        clock: the time.
    """

    def __init__(
        self,
        broker: Broker,
        topic: str,
        *,
        codec: Codec,
        start_thread: Callable[[Callable[[], None], str], None],
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._topic = topic
        self._codec = codec
        self._start_thread = start_thread
        self._clock = clock
        self._lock = threading.Lock()
        self._askers: list[Asker] = []
        self._partition: int | None = None  # once its end is known
        self._reading = False
        self._closed = threading.Event()

    def serve(self, asker: Asker) -> None:
        """Gives every answer to this one too."""
        self._askers.append(asker)

    def open(self) -> int | None:
        """Sees to it that answers are read; returns where they are to go, or None until that is known.

        Who waits for an answer says so in `Asker.waits` before it calls this.
        """
        with self._lock:
            if not self._reading and not self._closed.is_set():
                self._reading = True
                self._start_thread(self._run, "replies")
            return self._partition

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _run(self) -> None:
        delay = FIRST
        while True:
            try:
                self._read()
                return
            except BrokerError as e:  # steps go on without answers; whoever asks asks again
                logger.warning("answers on %s cannot be read, trying again in %g s: %s", self._topic, delay, e)
                with self._lock:
                    self._partition = None
            if self._closed.wait(delay):
                return
            delay = min(2 * delay, LAST)

    def _read(self) -> None:
        partition = random.randrange(max(1, self._broker.partitions(self._topic)))  # noqa: S311 - spreads load only
        reader = self._broker.reader(self._broker.end_offsets([TP(self._topic, partition)]))
        try:
            with self._lock:
                self._partition = partition
            busy = self._clock.monotonic()
            while not self._closed.is_set():
                for asker in self._askers:
                    asker.ask(partition)
                for item in reader.poll(TICK):
                    if isinstance(item, Message):
                        self._take(item)
                with self._lock:
                    if any(asker.waits() for asker in self._askers):
                        busy = self._clock.monotonic()
                    elif self._clock.monotonic() - busy > IDLE:
                        self._partition, self._reading = None, False
                        return
        finally:
            reader.close()

    def _take(self, message: Message) -> None:
        try:
            reply = self._codec.decode_as(Reply, message.value)
        except CodecError:
            return  # the answer to somebody else; ours would be asked for again
        for asker in self._askers:
            asker.take(reply)
