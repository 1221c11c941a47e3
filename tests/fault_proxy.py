"""A proxy between Kafka's clients and a broker that loses, holds and cuts what the protocol says.

    with FaultProxy("127.0.0.1:9092") as proxy:
        broker = connect(f"kafka://{proxy.bootstrap}")
        proxy.drop_answers("EndTxn")  # the next commit reaches the broker, and its producer never learns of it

It stands before any cluster of one broker that listens on loopback, the tests' own or one that runs anyway, and there
may be several at once, so that each process has faults of its own. Every answer that names the broker names the proxy
instead, so all that a client sends goes through. Answers carry no API, only the number of their request, so each
connection remembers what it asked. As on any network, what is held back holds back what comes after it on its
connection, and a request that the proxy has taken reaches the broker even where its client has gone meanwhile.

TLS is not understood; SASL passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from confluent_kafka.admin import AdminClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

APIS = {
    0: "Produce", 1: "Fetch", 2: "ListOffsets", 3: "Metadata", 8: "OffsetCommit", 9: "OffsetFetch",
    10: "FindCoordinator", 11: "JoinGroup", 12: "Heartbeat", 13: "LeaveGroup", 14: "SyncGroup", 15: "DescribeGroups",
    16: "ListGroups", 17: "SaslHandshake", 18: "ApiVersions", 19: "CreateTopics", 20: "DeleteTopics",
    21: "DeleteRecords", 22: "InitProducerId", 23: "OffsetForLeaderEpoch", 24: "AddPartitionsToTxn",
    25: "AddOffsetsToTxn", 26: "EndTxn", 28: "TxnOffsetCommit", 29: "DescribeAcls", 32: "DescribeConfigs",
    33: "AlterConfigs", 36: "SaslAuthenticate", 37: "CreatePartitions", 42: "DeleteGroups", 44: "IncrementalAlterConfigs",
    47: "OffsetDelete", 60: "DescribeCluster", 68: "ConsumerGroupHeartbeat", 69: "ConsumerGroupDescribe",
    71: "GetTelemetrySubscriptions", 72: "PushTelemetry", 75: "DescribeTopicPartitions",
}  # fmt: skip
"""The names of the APIs by their keys, from Kafka's protocol guide; one that is missing here goes by its number."""

_LONGEST = 1 << 30
_GRACE = 5.0


class _Fault(NamedTuple):
    api: str
    at: Literal["request", "answer"]
    hold: float | None  # seconds; None: lost


class FaultProxy:
    """A context manager. Its methods may be called from any thread; a fault applies to what passes after the call.

    Args:
        upstream: ``host:port`` of the only broker of a cluster, on loopback.

    Attributes:
        bootstrap: ``host:port`` for clients.
        seen: how many requests of each API came in.
        struck: how many requests and answers of each API were lost or held.

    Raises:
        ValueError: there is more than one broker, or it does not listen on loopback.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.bootstrap = ""
        self.seen: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self._faults: defaultdict[_Fault, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")

    def __enter__(self) -> Self:
        brokers = AdminClient({"bootstrap.servers": self._upstream}).list_topics(timeout=30).brokers.values()
        if len(brokers) != 1:
            raise ValueError(f"a proxy stands before one broker, and at {self._upstream} there are {len(brokers)}")
        (broker,) = brokers
        self._host = str(broker.host)
        if not socket.gethostbyname(self._host).startswith("127."):
            raise ValueError(f"the broker at {self._upstream} calls itself {self._host}, which is not loopback")
        self._broker = struct.pack(">i", broker.port)
        self._broker_port = int(broker.port)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        port = self._server.sockets[0].getsockname()[1]
        self._ours = struct.pack(">i", port)
        self.bootstrap = f"{self._host}:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- faults ----------------------------------------------------------------------------------------------------

    def drop_answers(self, api: str, count: float = 1) -> None:
        """Loses the answers to the next ``count`` requests of the API; the broker has carried them out."""
        self._add(_Fault(api, "answer", None), count)

    def drop_requests(self, api: str, count: float = 1) -> None:
        """Loses the next ``count`` requests of the API on their way to the broker."""
        self._add(_Fault(api, "request", None), count)

    def delay(self, api: str, seconds: float, count: float = 1) -> None:
        """Holds each of the next ``count`` answers of the API for so long."""
        self._add(_Fault(api, "answer", seconds), count)

    def delay_requests(self, api: str, seconds: float, count: float = 1) -> None:
        """Holds each of the next ``count`` requests of the API for so long, then delivers it, come what may."""
        self._add(_Fault(api, "request", seconds), count)

    def heal(self) -> None:
        """Forgets all faults that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def pause(self) -> None:
        """Nothing passes in either direction until `resume`; connections stay open, and new ones are taken."""
        self._call(self._flowing.clear)

    def resume(self) -> None:
        """Ends a pause: what has gathered passes."""
        self._call(self._flowing.set)

    def cut(self) -> None:
        """Cuts all connections. Clients may come back at once."""
        self._call(self._cut)

    def wait_struck(self, api: str, count: int = 1, timeout: float = 30) -> None:
        """Waits until ``count`` requests or answers of the API have been lost or held. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while self.struck[api] < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.struck[api]} of {count} faults of {api} struck; seen: {dict(self.seen)}")
            time.sleep(0.01)

    def _add(self, fault: _Fault, count: float) -> None:
        if fault.api not in APIS.values():
            raise ValueError(f"no API is called {fault.api!r}")
        with self._lock:
            self._faults[fault] += count

    def _call(self, what: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (what(), done.set()))
        done.wait(10)

    # -- on the proxy's own thread ---------------------------------------------------------------------------------

    def take(self, api: str, at: Literal["request", "answer"]) -> _Fault | None:
        """The fault that strikes this request or answer, which is then used up."""
        with self._lock:
            for fault, left in self._faults.items():
                if fault.api == api and fault.at == at and left > 0:
                    self._faults[fault] = left - 1
                    self.struck[api] += 1
                    return fault
        return None

    def renamed(self, answer: bytes) -> bytes:
        """The answer with the proxy in the place of the broker.

        In every version of every answer a broker's port follows right upon its host, and ours is the same host: so
        no version's layout need be known, and no length changes.
        """
        host = self._host.encode()
        return answer.replace(host + self._broker, host + self._ours)

    async def flow(self) -> None:
        """Returns at once unless the proxy is paused."""
        await self._flowing.wait()

    async def _listen(self) -> asyncio.Server:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return await asyncio.start_server(accept, self._host, 0, family=socket.AF_INET)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.flow()
            broker = await asyncio.open_connection(self._host, self._broker_port, family=socket.AF_INET)
        except OSError:
            writer.close()
            return
        connection = _Connection(self, (reader, writer), broker)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _cut(self) -> None:
        for connection in self._connections:
            connection.cut()


_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    """One client's connection, and its twin to the broker."""

    def __init__(self, proxy: FaultProxy, client: _Ends, broker: _Ends) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_broker, self._to_broker = broker
        self._asked: dict[int, deque[str]] = defaultdict(deque)

    async def run(self) -> None:
        answers = asyncio.ensure_future(self._answers())
        try:
            await self._requests()
            # The client has gone. What was taken from it is carried out; the broker closes when it has read all.
            self._to_broker.write_eof()
            await asyncio.wait([answers], timeout=_GRACE)
        except OSError:
            pass
        finally:
            answers.cancel()
            self.cut()

    def cut(self) -> None:
        for writer in (self._to_client, self._to_broker):
            writer.transport.abort()

    async def _requests(self) -> None:
        while (frame := await _frame(self._from_client)) is not None:
            key, _version, correlation = struct.unpack_from(">hhi", frame)
            api = APIS.get(key, str(key))
            self._proxy.seen[api] += 1
            await self._proxy.flow()
            fault = self._proxy.take(api, "request")
            if fault is not None:
                if fault.hold is None:
                    continue
                await asyncio.sleep(fault.hold)
            self._asked[correlation].append(api)
            await _send(self._to_broker, frame)

    async def _answers(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := await _frame(self._from_broker)) is not None:
                (correlation,) = struct.unpack_from(">i", frame)
                api = self._asked[correlation].popleft()
                if not self._asked[correlation]:
                    del self._asked[correlation]
                await self._proxy.flow()
                fault = self._proxy.take(api, "answer")
                if fault is not None:
                    if fault.hold is None:
                        continue
                    await asyncio.sleep(fault.hold)
                await _send(self._to_client, self._proxy.renamed(frame))
        self._to_client.close()


async def _frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next frame without its length; None at the end of the connection."""
    try:
        (length,) = struct.unpack(">i", await reader.readexactly(4))
        if not 0 < length < _LONGEST:
            return None
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None


async def _send(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(struct.pack(">i", len(frame)) + frame)
    await writer.drain()
