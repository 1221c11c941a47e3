"""The embedded broker's socket and files: garbage ends one conversation, and damage is named or costs the end of the log."""

from __future__ import annotations

import shutil
import socket
import threading
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from durably.broker import connect
from durably.broker.embedded_channel import SOCKET, Channel, address
from durably.broker.port import TP, End, Message
from durably.errors import DurablyError
from durably_schemas import Catalogue
from fuzz.budget import budget
from hypothesis import Phase, given
from hypothesis import strategies as st
from rocksdict import Options, Rdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from durably.broker.port import Broker

CATALOGUE = Catalogue("fuzzed", 1)
COMMANDS = TP(CATALOGUE.commands, 0)
VALUES = [f"value {n} ".encode() * 20 for n in range(200)]
encode = msgspec.msgpack.Encoder().encode


def values_of(broker: Broker) -> list[Any]:
    """All of COMMANDS, up to the end that the reader finds."""
    reader = broker.reader({COMMANDS: 0})
    found: list[Any] = []
    try:
        while items := reader.poll(0.5):
            found += [m for m in items if isinstance(m, Message)]
            if any(isinstance(item, End) for item in items):
                break
    finally:
        reader.close()
    return [m.value for m in found]


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What threads have ended with."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


# -- the socket --------------------------------------------------------------------------------------------------------

THINGS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=5),
        st.just(CATALOGUE.commands), st.just([CATALOGUE.commands, 0]), st.just([[CATALOGUE.commands, 0]]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip
WORDS = st.sampled_from(
    [
        "send",
        "read",
        "seek",
        "describe",
        "topics",
        "group_metadata_of",
        "group_state",
        "end_offsets",
        "start_offsets",
        "offsets_at",
        "?",
    ]
)
SENDS = st.tuples(
    st.just("send"), st.one_of(THINGS, st.just(CATALOGUE.commands)), st.one_of(THINGS, st.just(b"v")),
    st.one_of(THINGS, st.just(b"k")), st.one_of(THINGS, st.just(0)), st.one_of(THINGS, st.just([])),
)  # fmt: skip
QUESTIONS = st.one_of(THINGS, SENDS, st.builds(lambda word, rest: [word, *rest], WORDS, st.lists(THINGS, max_size=3)))


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


FRAMES = st.one_of(
    QUESTIONS.map(encode).map(frame),
    st.binary(max_size=20).map(frame),
    st.just(frame(b"\x91" * 50_000)),
    st.binary(max_size=8),
    st.just(b"\xff\xff\xff\xff"),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Broker]]:
    folder = tmp_path_factory.mktemp("served") / "broker"
    broker = connect(f"embedded:{folder}")
    broker.create(CATALOGUE.topics())
    yield folder, broker
    broker.close()


@budget(100)
@given(st.lists(FRAMES, min_size=1, max_size=5))
def test_garbage_on_the_socket_ends_one_conversation_and_no_thread(
    served: tuple[Path, Broker], crashes: list[Any], frames: list[bytes]
) -> None:
    folder, broker = served
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with address(folder) as path:
        peer.connect(path)
    channel = Channel(peer)
    peer.settimeout(10)
    try:
        peer.sendall(b"".join(frames))
        peer.shutdown(socket.SHUT_WR)
        while True:
            for answer in channel.receive(10) or pytest.fail("no answer, and no end"):
                assert len(answer) == 2
    except (ConnectionError, BrokenPipeError):
        pass
    finally:
        channel.close()
    assert crashes == []
    for value in values_of(broker):
        assert value is None or isinstance(value, bytes)


@budget(60)
@given(st.binary(max_size=40))
def test_a_client_is_told_that_its_broker_talks_nonsense(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(frame(answer))
    theirs.close()
    try:
        (message,) = channel.receive(5)
    except ConnectionError:
        pass
    else:
        assert message == msgspec.msgpack.decode(answer)
    channel.close()


# -- the files ---------------------------------------------------------------------------------------------------------


def written(folder: Path) -> None:
    broker = connect(f"embedded:{folder}")
    broker.create(CATALOGUE.topics())
    producer = broker.producer()
    for value in VALUES:
        producer.send(COMMANDS.topic, value, key=b"k")
    assert producer.flush(10) == 0
    producer.close()
    broker.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A path whose records lie in RocksDB's write-ahead log, and one where they lie in a table."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("log", "table"):
        written(folder / name)
    table = Rdict(str(folder / "table" / "log"), Options(raw_mode=True))
    table.flush()
    table.close()
    for name in ("log", "table"):
        (folder / name / SOCKET).unlink(missing_ok=True)
    assert list((folder / "table" / "log").glob("*.sst"))
    return {name: folder / name for name in ("log", "table")}


def _cut(data: bytes, at: int, _: int) -> bytes:
    return data[: at % (len(data) + 1)]


def _flip(data: bytes, at: int, bit: int) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[at % len(data)] ^= 1 << bit % 8
    return bytes(changed)


def _more(data: bytes, at: int, bit: int) -> bytes:
    return data + bytes([bit % 256]) * (at % 60)


def _zeroes(data: bytes, at: int, _: int) -> bytes:
    at %= len(data) + 1
    return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]


_copies = count()


@budget(40, phases=[Phase.explicit, Phase.generate])  # a shrunk one says no more
@given(
    st.sampled_from(["log", "table"]),
    st.integers(0, 50),
    st.sampled_from([_cut, _flip, _more, _zeroes]),
    st.integers(0, 2**20),
    st.integers(0, 255),
)
def test_a_damaged_file_is_named_or_the_log_goes_on_behind_its_last_whole_record(
    sources: dict[str, Path],
    tmp_path: Path,
    source: str,
    which: int,
    damage: Callable[[bytes, int, int], bytes],
    at: int,
    bit: int,
) -> None:
    folder = tmp_path / str(next(_copies))
    shutil.copytree(sources[source], folder)
    kept = ("LOG", "LOCK", "OPTIONS")  # which RocksDB writes and does not read
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(kept))
    victim = files[which % len(files)]
    victim.write_bytes(damage(victim.read_bytes(), at, bit))
    try:
        broker = connect(f"embedded:{folder}")
    except DurablyError as e:
        assert str(folder) in str(e)
        return
    try:
        broker.create(CATALOGUE.topics())
        broker.identity(COMMANDS.topic)
        found = values_of(broker)
        assert found == VALUES[: len(found)]
        producer = broker.producer()
        producer.send(COMMANDS.topic, b"new", key=b"k")
        assert producer.flush(10) == 0
        producer.close()
        assert values_of(broker) == [*found, b"new"]
    except DurablyError as e:
        assert str(e)
    finally:
        broker.close()
        shutil.rmtree(folder)
