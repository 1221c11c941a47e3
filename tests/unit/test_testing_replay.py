"""Recorded histories and new code: `replay_history`, what it reads, and ``durably replay``."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from durably import (
    DeterminismError,
    NonDeterminismError,
    RegistrationError,
    RunBlockedError,
    SerializationError,
    create_hook,
    history,
    sleep,
    step,
    workflow,
)
from durably.authoring import Registry, WorkflowDefinition
from durably.authoring import registry as everything
from durably.testing import RunStuckError, WorkflowEnvironment, replay_history
from durably_schemas.records import Event

DURABLY = Path(sys.executable).with_name("durably")


@step
async def rep_charge(cents: int) -> str:
    return f"receipt-{cents}"


@step
async def rep_refund(receipt: str) -> str:
    return f"refunded {receipt}"


@workflow
async def rep_order(cents: int) -> str:
    receipt = await rep_charge(cents)
    await sleep("7d")
    return await rep_refund(receipt)


async def in_other_order(cents: int) -> str:
    await sleep("7d")
    return await rep_refund(await rep_charge(cents))


async def ends_early(cents: int) -> str:
    return await rep_charge(cents)


async def asks_more(cents: int) -> str:
    await rep_order.fn(cents)
    return await rep_charge(cents)


async def opens_a_file(_: int) -> str:
    return Path("/etc/hostname").read_text()  # noqa: ASYNC240 - that is the point


async def the_same(cents: int) -> str:
    receipt = await rep_charge(cents)
    for _ in range(1):
        await sleep(7 * 86_400)
    return await rep_refund(receipt) if receipt else receipt


async def elsewhere(cents: int) -> str:
    receipt = await rep_charge.options(queue="rep-elsewhere")(cents)
    await sleep("7d")
    return await rep_refund(receipt)


async def hurries(cents: int) -> str:
    receipt = await rep_charge(cents)
    refunded, _ = await asyncio.gather(rep_refund(receipt), sleep("7d"))
    return refunded


@workflow
async def rep_clumsy() -> str:
    return await opens_a_file(0)


def as_rep_order(fn: Any) -> list[WorkflowDefinition[..., Any]]:
    return [WorkflowDefinition("rep_order", fn)]


async def recorded(environment: WorkflowEnvironment, folder: Path) -> Path:
    run = await environment.start(rep_order, 5)
    await run.result()
    run.save(folder / "run.json")
    return folder / "run.json"


async def test_a_history_replays_with_the_code_that_made_it(durably_env: WorkflowEnvironment, tmp_path: Path) -> None:
    file = await recorded(durably_env, tmp_path)
    calls = len(durably_env.calls(rep_charge))
    replay_history(file)
    replay_history(durably_env.runs[0].events, [rep_order])
    replay_history(file, as_rep_order(the_same))
    replay_history(file, as_rep_order(elsewhere))
    assert len(durably_env.calls(rep_charge)) == calls, "a replay runs no step"


@pytest.mark.parametrize(
    ("changed", "expected", "found"),
    [
        (in_other_order, "#3 step_created rep_charge", "wait_created"),
        (ends_early, "#6 wait_created", "run_completed"),
        (asks_more, "run_completed", "step_created rep_charge"),
    ],
)
async def test_other_code_is_told_what_the_log_expects(
    durably_env: WorkflowEnvironment, tmp_path: Path, changed: Any, expected: str, found: str
) -> None:
    with pytest.raises(NonDeterminismError) as diverged:
        replay_history(await recorded(durably_env, tmp_path), as_rep_order(changed))
    assert expected in diverged.value.expected
    assert found in diverged.value.found
    assert ("PYTHONHASHSEED" in "".join(getattr(diverged.value, "__notes__", ()))) == (
        os.environ.get("PYTHONHASHSEED") != "0"
    )


async def test_code_that_only_a_step_may_have_is_named(durably_env: WorkflowEnvironment, tmp_path: Path) -> None:
    file = await recorded(durably_env, tmp_path)
    with pytest.raises(DeterminismError):
        replay_history(file, as_rep_order(opens_a_file))
    with pytest.raises(RegistrationError, match="rep_order"):
        replay_history(file, [])


@workflow
async def rep_waiting() -> Any:
    return await create_hook(token="rep-hook")


async def test_a_run_that_goes_on_is_replayed_as_far_as_its_log_goes(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(rep_waiting)
    with pytest.raises(RunStuckError):
        await run.result()
    replay_history(run.events)
    with pytest.raises(NonDeterminismError):
        replay_history(run.events, [WorkflowDefinition("rep_waiting", ends_early.__get__(5))])


async def test_a_run_that_was_not_ended_by_its_code_replays(durably_env: WorkflowEnvironment) -> None:
    unbegun = await durably_env.options(delay="1d").start(rep_order, 5)
    await unbegun.cancel()
    replay_history(unbegun.events)
    old = await durably_env.start(rep_order, 5)
    await durably_env.settle()
    new = await durably_env.client.get_run(old.id).reset(len(old.events))
    assert old.status == "cancelled"
    replay_history(old.events)
    await durably_env.run(new.id).result()
    replay_history(durably_env.run(new.id).events)
    blocked = await durably_env.start(rep_clumsy)
    with pytest.raises(RunBlockedError):
        await blocked.result()
    await blocked.cancel()
    replay_history(blocked.events, [WorkflowDefinition("rep_clumsy", rep_waiting.fn)])
    with pytest.raises(NonDeterminismError):
        replay_history(old.events, as_rep_order(hurries))


def test_a_run_is_replayed_with_the_version_that_it_began_with() -> None:
    first, second = (WorkflowDefinition("rep_versioned", fn, n) for n, fn in ((1, rep_order.fn), (2, in_other_order)))
    registry = Registry()
    registry.steps = everything.steps

    async def log_of(definition: WorkflowDefinition[..., Any]) -> list[Event]:
        registry.workflows.clear()
        registry.add_workflow(definition)
        with WorkflowEnvironment(registry=registry) as environment:
            run = await environment.start("rep_versioned", 5)
            await run.result()
            return run.events

    before, versioned = (asyncio.run(log_of(d)) for d in (WorkflowDefinition("rep_versioned", rep_order.fn), first))
    for log in (before, versioned):
        replay_history(log, [second, first])
    replay_history(before, [first])
    with pytest.raises(RegistrationError, match="began with version 1"):
        replay_history(versioned, [second])


def test_what_is_no_history_says_how_to_get_one(tmp_path: Path) -> None:
    for text in ("", "{}", "[]", "[1]", '[{"type": "run_created"}]', '[{"record": "AAAA"}]', '[{"record": "é"}]'):
        (tmp_path / "h.json").write_text(text)
        with pytest.raises(SerializationError, match="no history that can be replayed"):
            replay_history(tmp_path / "h.json")


async def test_an_export_holds_every_byte_and_is_readable(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(rep_order, 5)
    await run.result()
    text = history.dump(run.events)
    assert history.load(text) == run.events
    shown = json.loads(text)
    assert [event["type"] for event in shown] == [event.type for event in run.events]
    assert shown[2]["data"]["step"] == "rep_charge"
    with pytest.raises(SerializationError, match="beginning"):
        history.load(history.dump(run.events[1:]))


SHOP = """
import asyncio
from durably import AsyncClient, sleep, step, workflow

@step
async def pay(n: int) -> dict: return {"n": n, "raw": b"\\x00"}

@workflow
async def shop(n: int) -> dict:
    paid = await pay(n)
    await sleep(0.01)
    return paid

if __name__ == "__main__":
    async def main():
        async with AsyncClient("embedded:broker") as client:
            run = await client.options(run_id="order-7").start(shop, 7)
            await run.result(timeout=60)
    asyncio.run(main())
"""


def test_what_the_command_line_exports_it_replays(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "changed.py").write_text(SHOP.replace("    paid = await pay(n)", "    paid = await pay(n + 1)"))

    def durably(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [DURABLY, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    with subprocess.Popen(
        [DURABLY, "dev", "shop.py", "--path", "broker", "--port", "0"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    ) as dev:  # fmt: skip
        assert dev.stderr is not None
        try:
            while "ready: " not in (said := dev.stderr.readline()):
                assert said, "durably dev has ended"
            subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, timeout=60, check=True)
            exported = durably("runs", "events", "order-7", "--json", "--url", "embedded:broker")
        finally:
            dev.terminate()
    (tmp_path / "order.json").write_text(exported.stdout)
    same = durably("replay", "order.json", "--app", "shop.py")
    assert (same.returncode, same.stdout) == (0, "order.json: run order-7 (8 events) replays\n"), same
    changed = durably("replay", "order.json", "shop.py", "--app", "changed.py", "--json")
    assert changed.returncode == 1
    told, unreadable = map(json.loads, changed.stdout.splitlines())
    assert told["expected"].startswith("#3 step_created pay (step_1_")
    assert told["found"].startswith("step_created pay (step_1_")
    assert "no history that can be replayed" in unreadable["error"]
