"""What an operator finds in the logs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from durably import FatalError, get_step_metadata, step, workflow

if TYPE_CHECKING:
    import pytest
    from harness import System


@step
async def breaks(told: list[str]) -> None:
    raise FatalError(f"{told} {get_step_metadata().step_id}")


@workflow
async def calls_what_breaks() -> str:
    try:
        await breaks(["it broke in"])
    except FatalError as e:
        return str(e)
    return ""


def test_a_failure_of_a_step_is_logged_with_run_step_and_attempt(
    lone_system: System, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "durably")
    lone_system.start_processor()
    lone_system.start_worker()
    run = lone_system.client.start(calls_what_breaks)
    said = run.result(30)
    step_id = said.rpartition(" ")[2]
    wanted = f"step breaks ({step_id}, attempt 1) of run {run.id} failed"
    assert [line for line in caplog.messages if wanted in line and said in line]
