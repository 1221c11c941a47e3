"""Who reads what, how far behind, and with which members: asked of the broker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from durably.broker.port import TP, End, GroupMember
from durably.errors import DurablyError

if TYPE_CHECKING:
    from durably.broker.port import Broker
    from durably_schemas import Catalogue

_AT_ONCE = 4  # groups that are asked about
_NEAR = 16  # offsets: so few may all be markers of transactions, which are no records
_LOOK = 2.0  # seconds for looking at them


class Partition(NamedTuple):
    """How far a group is in one partition: the next offset that it reads, the end, and the records between them."""

    tp: TP
    committed: int
    end: int
    lag: int


class Queue(NamedTuple):
    """What a group reads. ``problem`` says why nothing is known of it."""

    name: str
    group: str
    topics: Sequence[str]
    partitions: Sequence[Partition] = ()
    members: Sequence[GroupMember] = ()
    problem: str | None = None

    @property
    def lag(self) -> int:
        """Records that are still to be read."""
        return sum(partition.lag for partition in self.partitions)


def queues(broker: Broker, catalogue: Catalogue) -> list[Queue]:
    """What processors and the workers of each queue read, the processors first.

    Raises:
        BrokerError: the broker does not say which topics there are.
    """
    inputs = (catalogue.commands, catalogue.results, catalogue.signals)
    found = [Queue("processors", f"{catalogue.namespace}.processor", inputs)]
    prefix = catalogue.requests("x")[:-1]
    for topic in sorted(broker.topics()):
        if topic.startswith(prefix):
            name = topic.removeprefix(prefix)
            found.append(Queue(name, f"{catalogue.namespace}.worker.{name}", (topic,)))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda queue: _asked(broker, queue), found))


def _asked(broker: Broker, queue: Queue) -> Queue:
    try:
        tps = [TP(topic, number) for topic in queue.topics for number in range(broker.partitions(topic))]
        members, offsets = broker.group_state(queue.group, tps)
        starts, ends = broker.start_offsets(tps), broker.end_offsets(tps, committed=True)
        at = {tp: max(starts[tp], offsets.get(tp, 0)) for tp in tps}
        lags = {tp: max(0, ends[tp] - at[tp]) for tp in tps}
        near = {tp: at[tp] for tp, lag in lags.items() if 0 < lag <= _NEAR}
        lags |= _counted(broker, near)
    except DurablyError as e:  # of one queue nothing may be known, and of the others all
        return queue._replace(problem=str(e))
    return queue._replace(partitions=[Partition(tp, at[tp], ends[tp], lags[tp]) for tp in tps], members=members)


def _counted(broker: Broker, positions: Mapping[TP, int]) -> dict[TP, int]:
    """How many records there are from these positions on; of the partitions whose end was reached in time."""
    counts, ended = dict.fromkeys(positions, 0), set[TP]()
    if not positions:
        return {}
    reader = broker.reader(positions)
    try:
        until = time.monotonic() + _LOOK
        while len(ended) < len(positions) and time.monotonic() < until:
            for item in reader.poll(0.2):
                tp = TP(item.topic, item.partition)
                if isinstance(item, End):
                    ended.add(tp)
                elif tp not in ended:
                    counts[tp] += 1
    finally:
        reader.close()
    return {tp: count for tp, count in counts.items() if tp in ended}
