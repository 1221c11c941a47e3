"""The broker port in memory, with faults on demand."""

from durably.testing.broker import MemoryBroker, MemoryProducer


class FakeBroker(MemoryBroker):
    """A broker whose producers can be made to fail.

    Attributes:
        failing: while it is set, what is sent is lost and acknowledged with this error.
        muted: while it is true, no acknowledgement is delivered.
    """

    url = "fake:"

    def __init__(self, max_record_bytes=1_000_000):
        super().__init__(max_record_bytes)
        self.failing = None
        self.muted = False

    def producer(self):
        return FakeProducer(self)


class FakeProducer(MemoryProducer):
    """One that heeds them."""

    def send(self, topic, value, *, on_ack=None, **where):
        if self._broker.failing is None:
            super().send(topic, value, on_ack=on_ack, **where)
            return
        self._broker.check(topic, value)
        self._acknowledge(on_ack, self._broker.failing, -1)

    def poll(self, timeout=0):
        if not self._broker.muted:
            super().poll(timeout)
