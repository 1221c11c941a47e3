"""A broker as a processor sees it that may die at any instant: after its death nothing that it does has any effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durably.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.broker.port import TP, Broker, Committed


class Dead(BrokerError):
    """The processor that calls is dead."""


class MortalBroker:
    """Passes everything on to a broker, until it dies."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.dead = False
        self.last_commit = False  # one commit more takes effect, but its caller does not live to see it

    def die(self, *, after_commit: bool) -> None:
        """Now; or as soon as one commit more has taken effect on the broker."""
        self.last_commit = after_commit
        self.dead = True

    def check(self) -> None:
        """Raises `Dead` after the death."""
        if self.dead:
            raise Dead("the processor is dead")

    def producer(self) -> Any:
        return _Producer(self, self._broker.producer())

    def transactions(self, transactional_id: str, timeout: float = 15) -> Any:
        return _Transactions(self, self._broker.transactions(transactional_id, timeout))

    def consumer(self, *args: Any, **options: Any) -> Any:
        return _Consumer(self, self._broker.consumer(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)


class _Part:
    """Of a broker."""

    def __init__(self, broker: MortalBroker, part: Any) -> None:
        self._mortal, self._part = broker, part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _Producer(_Part):
    """What was to be sent after the death has never left the process."""

    def send(self, *args: Any, **options: Any) -> None:
        self._mortal.check()
        self._part.send(*args, **options)


class _Transactions(_Part):
    """One that was open at the death stays open, until somebody resolves it."""

    def init(self, timeout: float) -> None:
        self._mortal.check()
        self._part.init(timeout)

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:
        if self._mortal.dead and self._mortal.last_commit:
            self._mortal.last_commit = False
            self._part.commit(offsets, group, timeout)
        self._mortal.check()
        self._part.commit(offsets, group, timeout)


class _Consumer(_Part):
    """The dead mark nothing as released."""

    def commit(self, offsets: Mapping[TP, Committed], *, wait: bool = False) -> None:
        self._mortal.check()
        self._part.commit(offsets, wait=wait)
