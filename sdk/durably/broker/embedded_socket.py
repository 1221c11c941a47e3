"""The embedded broker's socket: the process that owns the path serves it to the others."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas.catalogue import Topic

from durably.broker.embedded_broker import EmbeddedProducer, EmbeddedReader, state_of
from durably.broker.embedded_channel import SOCKET, Channel, address
from durably.broker.port import TP
from durably.errors import BrokerError

if TYPE_CHECKING:
    from durably.broker.embedded_group import Coordinator
    from durably.broker.embedded_log import Log


class Server:
    """Serves a log on the socket in its folder, readable by its owner only. One thread a connection."""

    def __init__(self, log: Log, coordinator: Coordinator) -> None:
        self._log = log
        self._coordinator = coordinator
        self._lock = threading.Lock()
        self._sessions: set[_Session] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stopping = False
        try:
            # The log's own lock is ours, so a socket that is there belongs to nobody any more.
            (log.path / SOCKET).unlink(missing_ok=True)
            with address(log.path) as path:
                self._listener.bind(path)
            (log.path / SOCKET).chmod(0o600)
            self._listener.listen(64)
        except BaseException:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._accept, name="durably-broker", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if self._stopping:
                    return
                time.sleep(0.05)  # out of descriptors, for instance
                continue
            session = _Session(self._log, self._coordinator, Channel(peer))
            with self._lock:
                self._sessions.add(session)
            session.thread = threading.Thread(
                target=self._serve, args=(session,), name="durably-broker-session", daemon=True
            )
            session.thread.start()

    def _serve(self, session: _Session) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions.discard(session)

    def close(self) -> None:
        """Ends all sessions."""
        self._stopping = True
        (self._log.path / SOCKET).unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.stop()
        for session in sessions:
            session.thread.join()


_Sent = tuple[str, bytes | None, bytes | None, int | None, list[tuple[str, bytes]]]


def _nothing() -> None:
    """A session does not keep the log open."""


class _Session:
    """One connection: what it asks is done in order, and answered with (error, result)."""

    thread: threading.Thread

    def __init__(self, log: Log, coordinator: Coordinator, channel: Channel) -> None:
        self._log = log
        self._coordinator = coordinator
        self._channel = channel
        self._producer = EmbeddedProducer(log, _nothing)
        self._reader = EmbeddedReader(log, {}, _nothing)

    def run(self) -> None:
        try:
            while True:
                answers: list[Any] = []
                for question in self._channel.receive():
                    self._do(question, answers)
                self._producer.poll()
                self._channel.send(answers)
        except ConnectionError:
            return
        finally:
            self._reader.close()
            self._channel.close()

    def stop(self) -> None:
        self._channel.stop()
        self._reader.wake()

    def _do(self, question: list[Any], answers: list[Any]) -> None:
        """Appends the answer; a record's is filled in when the producer is polled."""
        at = len(answers)
        answers.append((None, None))
        try:
            if question[0] == "send":

                def on_ack(error: Exception | None, offset: int) -> None:
                    answers[at] = (_named(error) if error else None, offset)

                # Converted, because what is stored is not looked at again.
                topic, value, key, partition, headers = msgspec.convert(question[1:], _Sent, builtin_types=(bytes,))
                self._producer.send(topic, value, key=key, partition=partition, headers=headers, on_ack=on_ack)
            else:
                answers[at] = (None, self._answer(question[0], question[1:]))
        except Exception as error:
            # Whatever a question does to us is its asker's to know; the other sessions go on.
            answers[at] = (_named(error), None)

    def _answer(self, what: str, args: list[Any]) -> object:
        log = self._log
        match what, args:
            case "poll", [timeout, limit]:
                return self._reader.poll(timeout, limit)
            case "read", [positions]:
                for tp, position in positions:
                    self._reader.seek(TP(*tp), position)
                return None
            case "seek", [tp, position]:
                self._reader.seek(TP(*tp), position)
                return None
            case "describe", [names]:
                return {name: log.topics[name] for name in names if name in log.topics}
            case "topics", []:
                return sorted(log.topics)
            case "group_metadata_of", [tps, group]:
                with log.lock:
                    return [log.committed(group, TP(*tp)).metadata for tp in tps]
            case "group_state", [tps, group]:
                with log.lock:
                    members, offsets = state_of(log, self._coordinator, group, [TP(*tp) for tp in tps])
                return members, list(offsets.items())
            case "create", [topics]:
                log.create(msgspec.convert(topics, list[Topic]))
                return None
        with log.lock:
            log.write()
            partitions = [log.partition(TP(*tp)) for tp in args[0]]
            match what, args:
                case "end_offsets", [_]:
                    return [partition.end for partition in partitions]
                case "start_offsets", [_]:
                    return [partition.start for partition in partitions]
                case "offsets_at", [_, timestamp]:
                    return [log.offset_at(partition, timestamp) for partition in partitions]
        raise BrokerError(f"unknown question {what!r}: the owner of {log.path} has another version of durably")


def _named(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)
