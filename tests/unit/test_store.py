"""RocksDB is a cache: what is damaged of it is found out, and read from the topic again."""

from __future__ import annotations

import gc
import random
import shutil
from pathlib import Path

import harness
import pytest
from durably import sleep, step, workflow
from durably_processor.state.store import CHECKPOINT, Store, StoreDamaged, event_key
from durably_schemas.codec import MARKER

COUNT = 300


def filled(path: Path) -> Store:
    store = Store(path)
    for i in range(COUNT):
        value = MARKER + random.Random(i).randbytes(1_000)
        store.write({event_key("run", i): value, CHECKPOINT: i.to_bytes(8, "big")})
    return store


def damage(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.8])
def test_a_scan_over_damaged_blocks_does_not_end_as_if_nothing_followed(tmp_path, where):
    filled(tmp_path / "store").close()
    (file,) = (tmp_path / "store").glob("*.sst")
    damage(file, int(file.stat().st_size * where))
    store = Store(tmp_path / "store")
    with pytest.raises(StoreDamaged) as found:
        list(store.events("run", 0))
    assert found.value.path == tmp_path / "store"
    with pytest.raises(StoreDamaged):
        [store.event("run", i) for i in range(COUNT)]
    store.close()


@pytest.mark.parametrize("pattern", ["MANIFEST-*", "CURRENT", "*.sst"])
def test_a_store_that_cannot_be_opened_begins_empty(tmp_path, pattern):
    filled(tmp_path / "store").close()
    for file in (tmp_path / "store").glob(pattern):
        damage(file, file.stat().st_size - 1)  # of an SST file: the number at its end that says what it is
    store = Store(tmp_path / "store")
    assert store.checkpoint == 0
    assert list(store.events("run", 0)) == []
    store.close()


def test_a_damaged_end_of_the_write_ahead_log_leaves_what_was_written_before_it(tmp_path):
    store = filled(tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "crashed")
    store.close()
    (file,) = (tmp_path / "crashed").glob("*.log")
    damage(file, file.stat().st_size // 2)
    store = Store(tmp_path / "crashed")
    assert 0 < store.checkpoint < COUNT - 1
    assert len(list(store.events("run", 0))) == store.checkpoint + 1
    store.close()


def test_nothing_that_is_logged_survives_what_was_written_without_a_log_before_it(tmp_path):
    """A copy's restoration is interrupted by its broker, say, and there is little left to read in the next round."""
    store = Store(tmp_path / "store")
    store.write({event_key("run", 1): MARKER}, logged=False)
    store.write({event_key("run", 2): MARKER})
    shutil.copytree(tmp_path / "store", tmp_path / "crashed")
    store.close()
    store = Store(tmp_path / "crashed")
    assert len(list(store.events("run"))) == 2
    store.close()


@step
async def stored_one(n: int) -> int:
    return n


@workflow
async def stored_steps(n: int) -> int:
    total = 0
    for i in range(5):
        total += await stored_one(i)
    await sleep("2s")
    return total + await stored_one(n)


@step
async def stored_bytes(n: int) -> bytes:
    return random.Random(n).randbytes(5_000)


@workflow
async def stored_ended(n: int) -> int:
    await stored_bytes(n)
    return n


def test_a_processor_with_damaged_files_reads_the_topic_again_and_loses_nothing(tmp_path, namespace):
    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    first = system.start_processor()
    system.start_worker()
    runs = [system.client.start(stored_steps, n) for n in range(20)]
    for run in runs:
        harness.until(lambda run=run: "wait_created" in system.types(run.id))
    system.stop_processor(first)
    tables = list((tmp_path / "p").glob("partition-*/*.sst"))
    assert tables
    for file in tables:
        damage(file, 100)  # in the first block of data
    system.start_processor()
    assert [run.result(30) for run in runs] == [10 + n for n in range(20)]
    assert system.violations() == []
    system.close()


@pytest.fixture
def nothing_collected():
    """What only a collection would let go of is kept for as long as it might be."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_collected")
def test_damage_that_is_found_while_somebody_is_answered_is_read_again_and_the_answer_given(tmp_path, namespace):
    """It is found on the commit thread, whose error lives on: the iterator that met it must not, or the store is locked."""
    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    first = system.start_processor()
    system.start_worker()
    runs = [system.client.start(stored_ended, n) for n in range(20)]
    assert [run.result(30) for run in runs] == list(range(20))
    logs = [[event.seq for event in run.events()] for run in runs]
    system.stop_processor(first)
    tables = list((tmp_path / "p").glob("partition-*/*.sst"))
    assert tables
    for file in tables:
        damage(file, file.stat().st_size * 2 // 5)  # most of it is events
    second = system.start_processor()
    assert [[event.seq for event in run.events()] for run in runs] == logs
    assert second.error is None
    system.close()
