"""Runs from outside: starting, attaching, listing, delaying, attributes; owners that come, go and lose their stores."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import checker
import pytest
from durably import (
    AsyncClient,
    ConfigurationError,
    RecordTooLarge,
    RunFailedError,
    RunNotFoundError,
    create_hook,
    set_attributes,
    sleep,
    step,
    workflow,
)
from durably.authoring import Registry
from durably_processor.processor import Processor
from durably_schemas import Catalogue, Codec, records
from durably_schemas.records import Payload
from harness import PARTITIONS, until


@step
async def plus(a: int, b: int) -> int:
    return a + b


@workflow
async def sums(n: int) -> int:
    total = 0
    for i in range(n):
        total = await plus(total, i)
    return total


@workflow
async def awaits_a_hook(token: str) -> Any:
    return await create_hook(token=token)


@workflow
async def naps_once(seconds: float) -> str:
    await sleep(seconds)
    return "rested"


# -- starting ----------------------------------------------------------------------------------------------------------


def test_a_second_start_attaches_to_the_first_run_of_its_id(system):
    run_id = system.fresh("order")
    first = system.client.options(run_id=run_id, attributes={"customer": "Ada"}).start(sums, 3)
    second = system.client.options(run_id=run_id).start(sums, 99)
    assert first.result(30) == second.result(30) == 3
    third = system.client.options(run_id=run_id).start(sums, 99)
    assert third.result(30) == 3
    assert first.describe().attributes == {"customer": "Ada"}
    assert system.types(run_id).count("run_created") == 1


def test_many_that_start_one_id_at_once_start_one_run(system):
    run_id = system.fresh("popular")

    async def start() -> list[int]:
        async with AsyncClient(system.broker, namespace=system.namespace) as client:
            runs = await asyncio.gather(*(client.options(run_id=run_id).start(sums, n) for n in range(20)))
            return await asyncio.gather(*(run.result(30) for run in runs))

    results = asyncio.run(start())
    assert len(set(results)) == 1
    assert system.types(run_id).count("run_created") == 1


def test_a_run_without_an_id_gets_one_of_its_own(system):
    runs = [system.client.start(sums, 1) for _ in range(20)]
    assert len({run.id for run in runs}) == 20
    assert all(run.id.startswith("wrun_") for run in runs)
    assert [run.result(30) for run in runs] == [0] * 20


@pytest.mark.parametrize("run_id", ["", "a|b", "x" * 201, "hook_x", "two\nlines"])
def test_an_id_that_no_run_may_have_is_refused_at_once(system, run_id):
    with pytest.raises(ConfigurationError):
        system.client.options(run_id=run_id).start(sums, 1)
    with pytest.raises(ConfigurationError):
        system.client.get_run(run_id)


def test_a_start_returns_before_the_run_has_ended(system):
    token = system.fresh("unhurried")
    run = system.client.start(awaits_a_hook, token)
    assert run.status() in {"pending", "running"}
    with pytest.raises(TimeoutError, match="has not ended within"):
        run.result(0.01)
    system.hook(token)
    system.client.resume_hook(token, 1)
    assert run.result(30) == 1


def test_a_run_knows_what_it_is_and_when_it_began_and_ended(system):
    run = system.client.start(sums, 2)
    assert run.result(30) == 1
    summary = run.describe()
    assert (summary.run_id, summary.workflow, summary.status) == (run.id, "sums", "completed")
    assert summary.created_at <= summary.started_at <= summary.completed_at
    assert summary.events == len(run.events())
    assert summary.error is None
    assert summary.code_version


def test_what_is_unknown_is_said_so(system):
    nobody = system.client.get_run("nobody")  # asks for nothing yet
    for ask in (nobody.status, nobody.describe, nobody.events, nobody.cancel, nobody.hooks, lambda: nobody.result(10)):
        with pytest.raises(RunNotFoundError) as raised:
            ask()
        assert raised.value.run_id == "nobody"


def test_a_run_may_be_started_by_name_and_by_json(system):
    assert system.client.start("sums", 4).result(30) == 6
    starter = system.client.options(run_id=system.fresh("json"))
    payload = Payload(content_type="application/json", data=json.dumps({"n": 3}).encode())
    assert starter.start_payload("sums", payload).result(30) == 3


def test_a_start_that_is_too_large_is_refused_where_it_arises(system):
    with pytest.raises(RecordTooLarge, match="reference"):
        system.client.start("sums", "x" * 2_000_000)


def test_both_clients_do_the_same(system):
    async def use() -> list[Any]:
        async with AsyncClient(system.broker, namespace=system.namespace) as client:
            run = await client.options(attributes={"by": "async"}).start(sums, 3)
            result = await run.result(30)
            return [result, await run.status(), (await run.describe()).attributes, len(await run.events())]

    assert asyncio.run(use()) == [3, "completed", {"by": "async"}, 12]


# -- delays ------------------------------------------------------------------------------------------------------------


def test_a_delayed_run_is_pending_until_its_time_has_come(system):
    distant = system.client.options(delay="1h").start(sums, 1)
    assert distant.status() == "pending"
    assert distant.describe().started_at is None
    distant.cancel()
    delayed = system.client.options(delay="200ms").start(sums, 1)
    assert delayed.result(30) == 0
    summary = delayed.describe()
    assert summary.started_at - summary.created_at >= 150
    at = datetime.now(UTC) + timedelta(milliseconds=50)
    assert system.client.options(delay=at).start(sums, 2).result(30) == 1


def test_a_delay_that_is_over_is_none(system):
    past = system.client.options(delay=datetime.now(UTC) - timedelta(days=1)).start(sums, 1)
    assert past.result(30) == 0


# -- attributes and lists ----------------------------------------------------------------------------------------------


@workflow
async def tags_itself(token: str) -> str:
    set_attributes(stage="waiting", owner="Ada")
    await create_hook(token=token)
    set_attributes({"stage": "done", "owner": None}, number="7")
    set_attributes(number="8")
    return "done"


def test_a_workflow_sets_attributes_that_its_run_is_found_by(system):
    token = system.fresh("tagged")
    run = system.client.options(attributes={"token": token}).start(tags_itself, token)
    system.hook(token)
    found = until(lambda: system.client.runs(attributes={"token": token, "stage": "waiting"}))
    assert [r.run_id for r in found] == [run.id]
    system.client.resume_hook(token)
    assert run.result(30) == "done"
    assert run.describe().attributes == {"token": token, "stage": "done", "number": "8"}
    assert system.types(run.id).count("attributes_set") == 2
    assert system.client.runs(attributes={"token": token, "stage": "waiting"}) == []
    assert [r.run_id for r in system.client.runs(attributes={"stage": "done", "token": token})] == [run.id]


@workflow
async def tags_wrongly(kind: str) -> None:
    if kind == "number":
        set_attributes(n=1)  # type: ignore[arg-type]
    set_attributes(text="x" * 20_000)


def test_attributes_are_texts_of_a_bounded_length(system):
    for kind, error in (("number", TypeError), ("length", RecordTooLarge)):
        with pytest.raises(RunFailedError) as raised:
            system.client.start(tags_wrongly, kind).result(30)
        assert isinstance(raised.value.cause, error)
    with pytest.raises(ConfigurationError):
        system.client.options(attributes={"text": "x" * 20_000}).start(sums, 1)
    with pytest.raises(TypeError):
        system.client.options(attributes={"n": 1}).start(sums, 1)


def test_runs_are_listed_by_workflow_status_and_attributes_newest_first(system):
    mark = system.fresh("listed")
    runs = [system.client.options(attributes={"mark": mark}).start(sums, n) for n in range(3)]
    failed = system.client.options(attributes={"mark": mark}).start("sums", "x")
    for run in runs:
        run.result(30)
    with pytest.raises(RunFailedError):
        failed.result(30)
    listed = system.client.runs(attributes={"mark": mark})
    assert {r.run_id for r in listed} == {run.id for run in [*runs, failed]}
    assert [r.created_at for r in listed] == sorted((r.created_at for r in listed), reverse=True)
    completed = system.client.runs(workflow="sums", status="completed", attributes={"mark": mark})
    assert {r.run_id for r in completed} == {run.id for run in runs}
    assert system.client.runs(workflow="other", attributes={"mark": mark}) == []
    assert len(system.client.runs(status=["completed", "failed"], attributes={"mark": mark}, limit=2)) == 2


def test_a_rerun_repeats_input_and_attributes_under_another_id(system):
    run = system.client.options(attributes={"kind": "first"}).start(sums, 5)
    assert run.result(30) == 10
    again = run.rerun()
    assert again.id != run.id
    assert again.result(30) == 10
    assert again.describe().attributes == {"kind": "first"}
    assert again.describe().origin == records.Origin(run_id=run.id)
    named = system.fresh("rerun")
    assert run.rerun(run_id=named).id == named
    assert system.client.get_run(named).result(30) == 10


# -- owners that come and go -------------------------------------------------------------------------------------------


def test_a_processor_that_restarts_goes_on_where_it_was(lone_system):
    processor = lone_system.start_processor()
    lone_system.start_worker()
    runs = [lone_system.client.start(naps_once, 1.0) for _ in range(5)]
    chains = [lone_system.client.start(sums, 40) for _ in range(5)]
    lone_system.stop_processor(processor)
    lone_system.start_processor()
    assert [run.result(30) for run in runs] == ["rested"] * 5
    assert [run.result(30) for run in chains] == [sum(range(40))] * 5


def test_a_store_that_is_lost_is_rebuilt_from_the_topic(lone_system):
    processor = lone_system.start_processor("a")
    lone_system.start_worker()
    token = lone_system.fresh("kept")
    done, parked = lone_system.client.start(sums, 3), lone_system.client.start(naps_once, 1.5)
    waiting = lone_system.client.start(awaits_a_hook, token)
    assert done.result(30) == 3
    lone_system.hook(token)
    until(lambda: "wait_created" in lone_system.types(parked.id))
    before = [done.events(), waiting.events()]
    lone_system.stop_processor(processor)
    lone_system.start_processor("b")
    assert [done.events(), waiting.events()] == before
    assert done.describe().status == "completed"
    lone_system.client.resume_hook(token, "still there")
    assert waiting.result(30) == "still there"
    assert parked.result(30) == "rested"


def test_two_processors_share_the_partitions(lone_system):
    first = lone_system.start_processor("a")
    second = lone_system.start_processor("b")
    lone_system.start_worker()
    runs = [lone_system.client.start(sums, 10) for _ in range(20)]
    assert [run.result(60) for run in runs] == [45] * 20
    late = [lone_system.client.start(sums, 30) for _ in range(10)]
    lone_system.stop_processor(second)
    assert [run.result(60) for run in late] == [435] * 10
    assert first.error is None


def test_what_cannot_be_read_goes_to_dead_letters_and_the_rest_goes_on(lone_system):
    lone_system.start_processor()
    lone_system.start_worker()
    producer, codec = lone_system.broker.producer(), Codec()
    commands = lone_system.catalogue.commands
    start = records.StartRun(
        run_id="r", workflow="sums", input=Payload(content_type="application/json", data=b"[1]"), requested_at=0
    )
    bad = [
        (b"nonsense", b"k", 0),
        (codec.encode(start), b"other-key", 0),
        (codec.encode(records.CancelRun(run_id="x", requested_at=1))[:-1], b"x", 1),
    ]
    for value, key, partition in bad:
        producer.send(commands, value, key=key, partition=partition)
    assert producer.flush(10) == 0
    assert [lone_system.client.start(sums, 2).result(30) for _ in range(4)] == [1] * 4
    letters = until(lambda: found if len(found := _dead_letters(lone_system)) == 3 else None)
    assert sorted((x.value, x.key) for x in letters) == sorted((v, k) for v, k, _ in bad)
    assert all(x.reason and x.topic == commands for x in letters)
    producer.close()


def _dead_letters(system):
    return [letter for _, letter in checker.read(system.broker, system.catalogue.dead_letters)]


def test_bad_circumstances_are_named(lone_system):
    running = lone_system.start_processor("shared")
    broker, namespace, folder = lone_system.broker, lone_system.namespace, lone_system.folder
    for catalogue, where, message in (
        (lone_system.catalogue, "shared", "in use"),
        (Catalogue(namespace + "x", PARTITIONS), "x", "durably topics create"),
        (Catalogue(namespace, 7), "y", "7 partitions"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Processor(broker, catalogue, Registry(), folder / where).run()
    assert running.error is None
    assert threading.active_count() > 1, "it is still there"
