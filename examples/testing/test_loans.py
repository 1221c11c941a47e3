"""Tests of `loans`: three months in milliseconds. ``pytest examples/testing``."""

from datetime import timedelta
from pathlib import Path

import pytest
from durably import FatalError, NonDeterminismError, RunFailedError
from durably.authoring import WorkflowDefinition
from durably.testing import WorkflowEnvironment, replay_history
from loans import loan, pay_out, remind, score

RECORDED = Path(__file__).with_name("loan.json")


async def test_a_small_loan_is_paid_out_and_reminded_of_three_times(durably_env: WorkflowEnvironment) -> None:
    begin = durably_env.now
    run = await durably_env.start(loan, "Ada", 50_000)
    assert await run.result() == "50000 cents to Ada"
    assert len(durably_env.calls(remind)) == 3
    assert durably_env.now - begin >= timedelta(days=90)


async def test_a_poor_score_ends_it(durably_env: WorkflowEnvironment) -> None:
    durably_env.replace(score, [1])
    with pytest.raises(RunFailedError) as failed:
        await (await durably_env.start(loan, "Bob", 50_000)).result()
    assert isinstance(failed.value.cause, FatalError)
    assert durably_env.calls(pay_out) == []


async def test_the_agency_may_be_down_for_a_while(durably_env: WorkflowEnvironment) -> None:
    durably_env.replace(score, [OSError("down"), OSError("still down"), 700])
    await (await durably_env.start(loan, "Ada", 1)).result()
    assert [call.attempt for call in durably_env.calls(score)] == [1, 2, 3]


async def test_a_large_loan_is_approved_by_a_person(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(loan, "Ada", 500_000)
    await durably_env.advance("3d")
    await durably_env.resume_hook("loan-Ada", payload=False)
    assert await run.result() == "refused"


async def test_nobody_decides_for_a_week(durably_env: WorkflowEnvironment) -> None:
    assert await (await durably_env.start(loan, "Ada", 500_000)).result() == "nobody decided"


@pytest.mark.durably(skip_time=False)
async def test_it_survives_crashes_at_every_month(durably_env: WorkflowEnvironment) -> None:
    durably_env.crash_after(pay_out)
    run = await durably_env.start(loan, "Ada", 50_000)
    for _ in range(3):
        durably_env.crash_processor()
        await durably_env.advance("30d")
    assert await run.result() == "50000 cents to Ada"
    assert len(durably_env.calls(pay_out)) == 2, "a crash, and so once more"
    assert [event.type for event in run.events].count("step_completed") == 5, "and yet it counts once"


def test_loans_that_run_can_go_on_with_this_code() -> None:
    replay_history(RECORDED)


def test_code_that_cannot_take_them_over_is_found_out() -> None:
    async def without_score(applicant: str, cents: int) -> str:
        return await pay_out(applicant, cents)

    with pytest.raises(NonDeterminismError, match=r"expected #3 step_created score .*, found step_created pay_out"):
        replay_history(RECORDED, [WorkflowDefinition("loan", without_score)])


@pytest.mark.durably(skip_time=False)
async def test_time_that_nobody_lets_pass_stands_still(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(loan, "Ada", 50_000)
    with pytest.raises(TimeoutError):
        await run.result(timeout=0.1)
