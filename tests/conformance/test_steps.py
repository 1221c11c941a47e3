"""Steps: how they run, what they know of themselves, how they are retried, and what becomes of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import checker
import pytest
from durably import (
    FatalError,
    RecordTooLarge,
    RetryableError,
    RunBlockedError,
    RunFailedError,
    SerializationError,
    StepTimeoutError,
    get_step_metadata,
    get_workflow_metadata,
    step,
    workflow,
)
from durably.authoring import Registry

EXECUTIONS: dict[str, list[object]] = defaultdict(list)
"""What steps have seen of themselves, by run."""


@step
async def add(a: int, b: int) -> int:
    return a + b


@step
def add_in_a_thread(a: int, b: int) -> int:
    assert threading.current_thread() is not threading.main_thread()
    return a + b


@workflow
async def sequential(n: int) -> int:
    total = 0
    for i in range(n):
        total = await add(total, i)
    return total


def test_sequential_steps_are_recorded_one_after_the_other(system):
    runs = [system.client.start(sequential, 10) for _ in range(10)]
    assert [r.result(30) for r in runs] == [45] * 10
    events = runs[0].events()
    assert [e.seq for e in events] == list(range(1, 34))
    assert [e.type for e in events[2:-1]] == ["step_created", "step_started", "step_completed"] * 10


@workflow
async def mixed(n: int) -> list[int]:
    return await asyncio.gather(*(add(i, i) if i % 2 else add_in_a_thread(i, i) for i in range(n)))


def test_parallel_steps_are_handed_out_together(system):
    run = system.client.start(mixed, 60)
    assert run.result(30) == [2 * i for i in range(60)]
    types = system.types(run.id)
    assert types[2:62] == ["step_created"] * 60
    assert types.count("step_completed") == 60


@step(backoff="5ms")
async def flaky(failures: int) -> int:
    meta = get_step_metadata()
    EXECUTIONS[meta.run_id].append(meta.attempt)
    if meta.attempt <= failures:
        raise RuntimeError(f"attempt {meta.attempt}")
    return meta.attempt


@step(backoff="5ms", max_retries=0)
async def never_retried() -> None:
    raise RuntimeError(f"attempt {get_step_metadata().attempt}")


@workflow
async def retried(failures: int) -> int:
    return await flaky(failures)


@workflow
async def retried_once(failures: int) -> int:
    return await flaky.options(max_retries=1)(failures)


@workflow
async def not_retried() -> None:
    await never_retried()


def test_a_step_that_raises_is_tried_again(system):
    run = system.client.start(retried, 2)
    assert run.result(30) == 3
    assert sorted(set(EXECUTIONS[run.id])) == [1, 2, 3]
    assert system.types(run.id).count("step_retrying") == 2


def test_three_retries_follow_the_first_attempt_unless_the_step_or_the_call_says_otherwise(system):
    runs = {
        system.client.start(retried, 99): (4, "attempt 4"),
        system.client.start(retried_once, 99): (2, "attempt 2"),
        system.client.start(not_retried): (1, "attempt 1"),
    }
    for run, (attempts, message) in runs.items():
        with pytest.raises(RunFailedError, match=message):
            run.result(30)
        types = system.types(run.id)
        assert (types.count("step_started"), types.count("step_failed")) == (attempts, 1)


def test_exhausted_retries_say_how_many(system):
    with pytest.raises(RunFailedError) as raised:
        system.client.start(retried, 99).result(30)
    assert isinstance(raised.value.cause, RuntimeError)
    assert any("failed after 3 retries" in note for note in raised.value.cause.__notes__)


@step(max_retries=1, backoff="1h")
async def busy(kind: str) -> float:
    meta = get_step_metadata()
    if meta.attempt > 1:
        return meta.attempt
    delay = {
        "number": 0.1,
        "text": "100ms",
        "timedelta": timedelta(milliseconds=100),
        "instant": datetime.now(UTC) + timedelta(milliseconds=100),
    }[kind]
    raise RetryableError("busy", retry_after=delay)


@step(max_retries=1, backoff="1h")
async def always_busy() -> None:
    raise RetryableError("busy", retry_after=0)


@step
async def declines_for_good() -> None:
    EXECUTIONS[get_step_metadata().run_id].append("declined")
    raise FatalError("no")


@workflow
async def waits_for_busy(kind: str) -> float:
    return await busy(kind)


@workflow
async def waits_for_always_busy() -> None:
    await always_busy()


@workflow
async def is_declined() -> None:
    await declines_for_good()


@pytest.mark.parametrize("kind", ["number", "text", "timedelta", "instant"])
def test_a_step_may_say_when_it_is_to_be_tried_again(system, kind):
    run = system.client.start(waits_for_busy, kind)
    assert run.result(30) == 2
    (retrying,) = [e for e in run.events() if e.type == "step_retrying"]
    assert 0 < retrying.data.retry_at - retrying.at <= 150


def test_what_a_step_asks_for_counts_as_a_retry(system):
    with pytest.raises(RunFailedError, match="busy"):
        system.client.start(waits_for_always_busy).result(30)


def test_a_fatal_error_is_not_retried(system):
    run = system.client.start(is_declined)
    with pytest.raises(RunFailedError, match="no") as raised:
        run.result(30)
    assert isinstance(raised.value.cause, FatalError)
    assert "step_retrying" not in system.types(run.id)


@step(backoff="5ms")
async def introspective() -> tuple[str, str, int, datetime]:
    if get_step_metadata().attempt < 3:
        EXECUTIONS[get_step_metadata().run_id].append(_from_a_helper())
        raise RuntimeError
    return _from_a_helper()


def _from_a_helper() -> tuple[str, str, int, datetime]:
    meta = get_step_metadata()
    return meta.step_id, meta.step_name, meta.attempt, meta.started_at


@step
def introspective_in_a_thread() -> tuple[str, str]:
    return get_step_metadata().step_id, get_workflow_metadata().run_id


@workflow
async def asks_steps_for_themselves() -> list[object]:
    return [await introspective(), await introspective(), await introspective_in_a_thread()]


def test_a_step_knows_its_id_which_stays_through_retries_and_replays_and_differs_between_calls(system):
    run = system.client.start(asks_steps_for_themselves)
    first, second, (third, run_id) = run.result(30)
    assert run_id == run.id
    assert len({first[0], second[0], third}) == 3
    assert first[1:3] == second[1:3] == ("introspective", 3)
    assert {attempt[0] for attempt in EXECUTIONS[run.id]} == {first[0], second[0]}
    assert abs(first[3] - datetime.now(UTC)) < timedelta(minutes=1)


@step
async def describes_its_run() -> list[str]:
    meta = get_workflow_metadata()
    return [meta.run_id, meta.workflow_name, meta.started_at.isoformat()]


@workflow
async def describes_itself() -> list[list[str]]:
    meta = get_workflow_metadata()
    return [[meta.run_id, meta.workflow_name, meta.started_at.isoformat()], await describes_its_run()]


def test_workflow_and_steps_know_the_run_alike(system):
    run = system.client.start(describes_itself)
    in_workflow, in_step = run.result(30)
    assert in_workflow == in_step
    assert in_workflow[:2] == [run.id, "describes_itself"]


@step
async def appends(items: list[int]) -> list[int]:
    items.append(99)
    return items


@workflow
async def keeps_its_own() -> list[list[int]]:
    mine = [1]
    theirs = await appends(mine)
    mine.append(2)
    return [mine, theirs]


def test_arguments_and_results_are_copies(system):
    assert system.client.start(keeps_its_own).result(30) == [[1, 2], [1, 99]]


@step
async def combines(first: int, /, second: int = 2, *others: int, named: int, **rest: int) -> list[object]:
    return [first, second, list(others), named, rest]


@workflow
async def calls_in_every_way() -> list[object]:
    return [
        await combines(1, named=3),
        await combines(1, 5, 6, 7, named=3, more=4),
        await combines(1, named=2, second=9),
    ]


def test_arguments_travel_by_position_and_by_name(system):
    assert system.client.start(calls_in_every_way).result(30) == [
        [1, 2, [], 3, {}],
        [1, 5, [6, 7], 3, {"more": 4}],
        [1, 9, [], 2, {}],
    ]


@workflow
async def calls_wrongly() -> list[str]:
    said = []
    for call in (lambda: add(1), lambda: add(1, 2, 3), lambda: add(1, c=2)):  # type: ignore[call-arg]
        try:
            await call()
        except TypeError as e:
            said.append(str(e))
    return said


def test_arguments_that_do_not_fit_raise_in_the_workflow_and_record_nothing(system):
    run = system.client.start(calls_wrongly)
    assert all("add()" in message for message in run.result(30))
    assert "step_created" not in system.types(run.id)


@step(timeout="100ms", max_retries=1, backoff="5ms")
async def slow() -> None:
    await asyncio.sleep(30)


@step(timeout="100ms", max_retries=0)
def slow_in_a_thread() -> None:
    time.sleep(0.4)


@workflow
async def times_out() -> list[str]:
    said = []
    for call in (slow, slow_in_a_thread, sleeps_in_its_step.options(timeout="50ms", max_retries=0)):
        try:
            await call()
        except StepTimeoutError as e:
            said.append(str(e))
    return said


@step
async def sleeps_in_its_step() -> None:
    await asyncio.sleep(30)


def test_an_attempt_that_takes_longer_than_its_timeout_fails_and_is_retried(system):
    run = system.client.start(times_out)
    said = run.result(30)
    assert len(said) == 3
    assert "0.1 s" in said[0]
    assert system.types(run.id).count("step_retrying") == 1


@step
async def takes_its_time() -> int:
    EXECUTIONS[get_step_metadata().run_id].append("began")
    await asyncio.sleep(0.8)
    return 1


@workflow
async def is_patient() -> int:
    return await takes_its_time()


def test_a_long_step_becomes_a_lease_and_is_not_handed_out_again(system):
    run = system.client.start(is_patient)
    assert run.result(30) == 1
    started = [e for e in run.events() if e.type == "step_started"]
    assert started[0].data.lease_until is not None
    if system.mode != "restart":  # there, an early request may have gone out twice
        assert EXECUTIONS[run.id] == ["began"]


def test_a_step_runs_once_where_nothing_crashes(system):
    runs = [system.client.start(retried, 1) for _ in range(20)]
    assert [r.result(30) for r in runs] == [2] * 20
    for run in runs:
        times = Counter(EXECUTIONS[run.id])
        assert set(times) == {1, 2}
        assert system.mode == "restart" or set(times.values()) == {1}


@step(queue="other")
async def elsewhere() -> str:
    return get_step_metadata().step_name


@workflow
async def by_two_queues() -> list[object]:
    return [await elsewhere(), await add.options(queue="other")(1, 2)]


def test_steps_go_to_the_queue_that_they_or_their_call_name(system):
    run = system.client.start(by_two_queues)
    assert run.result(30) == ["elsewhere", 3]
    assert [e.data.queue for e in run.events() if e.type == "step_created"] == ["other", "other"]


@workflow
async def by_a_queue_that_is_not_there() -> object:
    return await add.options(queue="nowhere")(1, 2)


def test_a_queue_without_a_topic_blocks_the_run_and_says_what_to_do(system):
    run = system.client.start(by_a_queue_that_is_not_there)
    with pytest.raises(RunBlockedError, match="topics create --queue nowhere"):
        run.result(30)
    run.cancel()
    assert run.status() == "cancelled"


@workflow
async def hands_over_what_cannot_travel() -> list[str]:
    said = []
    for value in (lambda: 1, {"a": [1, object()]}, iter([])):
        try:
            await anything(value)
        except SerializationError as e:
            said.append(str(e))
    return said


@step
async def anything(value: object) -> object:
    return value


def test_an_argument_that_cannot_travel_raises_in_the_workflow_and_names_its_path(system):
    run = system.client.start(hands_over_what_cannot_travel)
    said = run.result(30)
    assert len(said) == 3
    assert all("'value'" in message for message in said)
    assert "['a'][1]" in said[1]
    assert "step_created" not in system.types(run.id)


@step(backoff="1h")
async def returns_what_cannot_travel() -> object:
    return {"lock": threading.Lock()}


@workflow
async def gets_what_cannot_travel() -> list[str]:
    try:
        await returns_what_cannot_travel()
    except SerializationError as e:
        return [str(e)]
    return []


def test_a_result_that_cannot_travel_fails_the_step_at_once(system):
    run = system.client.start(gets_what_cannot_travel)
    (message,) = run.result(30)
    assert "['lock']" in message
    assert "step_retrying" not in system.types(run.id)


@step(max_retries=0)
async def inflate(n: int) -> str:
    return "x" * n


@workflow
async def too_much(where: str) -> list[str]:
    try:
        if where == "argument":
            await anything("x" * 2_000_000)
        await inflate(2_000_000)
    except RecordTooLarge as e:
        return [str(e)]
    return []


def test_what_is_too_large_is_refused_where_it_arises(system):
    with pytest.raises(RecordTooLarge, match="reference"):
        system.client.start(too_much, "x" * 2_000_000)
    for where in ("argument", "result"):
        (message,) = system.client.start(too_much, where).result(30)
        assert "reference" in message
    assert system.client.start(sequential, 2).result(30) == 1, "nobody stopped"


@workflow
async def awaits_later() -> list[object]:
    early = asyncio.create_task(add(1, 2))
    late = await add(3, 4)
    return [late, await early]


@workflow
async def takes_the_first() -> int:
    tasks = {asyncio.create_task(takes_its_time()), asyncio.create_task(add(1, 1))}
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == len(pending) == 1
    return done.pop().result()


@workflow
async def in_order_of_completion() -> list[int]:
    return [await each for each in asyncio.as_completed([takes_its_time(), add(2, 3), add(3, 4)])]


@workflow
async def by_name() -> dict[str, int]:
    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(add(n, n)) for n, name in enumerate("abc")}
    return {name: task.result() for name, task in tasks.items()}


def test_steps_compose_by_asyncio(system):
    start = system.client.start
    runs = [start(awaits_later), start(takes_the_first), start(in_order_of_completion), start(by_name)]
    later, first, completed, named = [run.result(30) for run in runs]
    assert later == [7, 3]
    assert first == 2
    assert completed[-1] == 1
    assert sorted(completed) == [1, 5, 7]
    assert named == {"a": 0, "b": 2, "c": 4}


@workflow
async def leaves_a_step_behind() -> str:
    background = asyncio.create_task(add(1, 2))
    await asyncio.sleep(0)
    assert not background.done()
    return "done"


def test_a_step_that_was_called_and_not_awaited_still_runs_when_the_workflow_returns(system):
    run = system.client.start(leaves_a_step_behind)
    assert run.result(30) == "done"
    assert "step_created" in system.types(run.id)


@step
async def known_to_no_worker() -> None:
    """Registered where the workflow runs, and nowhere else."""


@workflow
async def asks_for_the_unknown() -> None:
    await known_to_no_worker()


def test_a_step_that_no_worker_knows_fails_clearly_and_is_kept(lone_system):
    few = Registry()
    few.steps["add"] = add
    lone_system.start_processor()
    lone_system.start_worker(registry=few)
    with pytest.raises(RunFailedError, match="known_to_no_worker"):
        lone_system.client.start(asks_for_the_unknown).result(30)
    ((_, letter),) = checker.read(lone_system.broker, lone_system.catalogue.dead_letters)
    assert "known_to_no_worker" in letter.reason
